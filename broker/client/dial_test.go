package client_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/broker/client"
)

// A message travels over every kind of connection, in many pieces.
func TestDial(t *testing.T) {
	b, _ := serve(t)
	for _, listen := range []string{"127.0.0.1:0", "ws://127.0.0.1:0/mqtt", "unix://" + filepath.Join(t.TempDir(), "s")} {
		t.Run(listen[:4], func(t *testing.T) {
			at, err := b.Listen(listen)
			if err != nil {
				t.Fatal(err)
			}
			r := run(t, client.Config{URL: at, Subscriptions: []client.Subscription{{Filter: "a/#", QoS: 1, NoLocal: false}}})
			receive(t, "up", r.up)
			want := strings.Repeat("x", 300_000)
			if err := r.Publish(t.Context(), client.Message{Topic: "a/b", Payload: []byte(want), QoS: 1}); err != nil {
				t.Fatal(err)
			}
			if m := receive(t, "message", r.msgs); string(m.Payload) != want {
				t.Errorf("got %d bytes", len(m.Payload))
			}
		})
	}
}

// Errors of addresses say what is wrong, and never repeat a credential.
func TestParseURLErrors(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	for _, c := range []struct{ raw, want string }{
		{"mqtt://cloud/mqtt", "only ws and wss have a path"},
		{"cloud:1883/mqtt", "only ws and wss have a path"},
		{"mqtt://cloud?x=y", "only ws and wss have a path"},
		{"mqtt://cloud:0", "want 1 to 65535"},
		{"mqtt://cloud:65536", "want 1 to 65535"},
		{"ws://cloud:99999/mqtt", "want 1 to 65535"},
		{"mqtt://cl oud", "invalid character"},
		{"mqtt://[::1", "missing ']'"},
		{"mqtt://user:secret@cl oud", "leave the credentials out"},
		{"mqtt://user:sec%zzret@cloud", "leave the credentials out"},
		{"user:secret@cloud:1883", "leave the credentials out"},
		{"user:sec/secret@cloud:1883", "leave the credentials out"},
		{"ws://user@cloud", "leave the credentials out"},
		{"unix://" + long, "the system allows 107"},
		{"://cloud", "missing protocol scheme"},
		{"MQTTX://cloud", `scheme "mqttx"`},
	} {
		d, err := client.ParseURL(c.raw, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, %v, want %q", c.raw, d, err, c.want)
			continue
		}
		if e := err.Error(); strings.Contains(e, "secret") || strings.Contains(e, "zzret") {
			t.Errorf("%q: the error repeats the credential: %v", c.raw, e)
		}
	}
	for raw, want := range map[string]string{
		"MQTT://cloud/":            "mqtt://cloud:1883/",
		"tcp://cloud":              "tcp://cloud:1883",
		"mqtt://cloud:65535":       "mqtt://cloud:65535",
		"ws://cloud/mqtt?tenant=a": "ws://cloud:80/mqtt?tenant=a",
		"unix://" + long[:107]:     "unix://" + long[:107],
	} {
		if d, err := client.ParseURL(raw, nil); err != nil || d.String() != want {
			t.Errorf("%q: %v, %v, want %s", raw, d, err, want)
		}
	}
}
