package broker_test

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

func mosquitto(t *testing.T, name, addr string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIP: %s is missing (apt-get install mosquitto-clients)", name)
	}
	host, port, _ := strings.Cut(strings.TrimPrefix(addr, "mqtt://"), ":")
	return exec.CommandContext(t.Context(), path, append([]string{"-h", host, "-p", port}, args...)...)
}

// Debian's clients, in both versions and every QoS.
func TestMosquitto(t *testing.T) {
	b, addr := open(t, t.TempDir())
	for _, version := range []string{"5", "311", "31"} {
		for _, qos := range []string{"0", "1", "2"} {
			t.Run("V"+version+" QoS "+qos, func(t *testing.T) {
				name := "m/" + version + "/" + qos
				sub, _ := connect(t, addr, 5, "sub")
				sub.subscribe(packets.Subscription{Filter: name, Qos: 2})
				for range 3 {
					out, err := mosquitto(t, "mosquitto_pub", addr, "-V", "mqttv"+version, "-q", qos, "-t", name, "-m", "hello", "-r").CombinedOutput()
					if err != nil || len(out) > 0 {
						t.Fatalf("%v: %s", err, out)
					}
				}
				for range 3 {
					if m := sub.next(); string(m.Payload) != "hello" {
						t.Errorf("got %q", m.Payload)
					}
				}
				sub.nothing()
				out, err := mosquitto(t, "mosquitto_sub", addr, "-V", "mqttv"+version, "-q", qos, "-t", "m/+/"+qos, "-C", "1", "-W", "20", "-F", "%t %p %r").CombinedOutput()
				if err != nil || !strings.HasSuffix(string(out), "/"+qos+" hello 1\n") {
					t.Errorf("%v: %s", err, out)
				}
			})
		}
	}
	// Several messages through one connection of either version.
	for _, version := range []string{"5", "311"} {
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "lines", Qos: 1})
		cmd := mosquitto(t, "mosquitto_pub", addr, "-V", "mqttv"+version, "-q", "2", "-t", "lines", "-l")
		var in bytes.Buffer
		for i := range 200 {
			in.WriteString(topicString(i) + "\n")
		}
		cmd.Stdin = &in
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for i := range 200 {
			if m := sub.next(); string(m.Payload) != topicString(i) {
				t.Fatalf("got %q, want %q", m.Payload, topicString(i))
			}
		}
	}
	// A refusal reaches the user of either version.
	out, err := mosquitto(t, "mosquitto_pub", addr, "-V", "mqttv5", "-q", "1", "-t", reading, "-m", "1", "-r", "-d").CombinedOutput()
	if !strings.Contains(string(out), "Not authorized") && !strings.Contains(string(out), "RC:135") {
		t.Errorf("%v: %s", err, out)
	}
	if err := b.Publish(t.Context(), broker.Message{Topic: "end", Payload: []byte("x")}); err != nil {
		t.Error(err)
	}
}

func topicString(i int) string { return string(topicN(i)) }
