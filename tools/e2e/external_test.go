package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Law 7: the cloud broker is replaceable. Debian's mosquitto takes its place,
// and everything goes on: it starts empty, is filled, and is lost and filled again.
func TestExternalBroker(t *testing.T) {
	mosquitto, err := exec.LookPath("mosquitto")
	if err != nil {
		if _, err := os.Stat("/usr/sbin/mosquitto"); err != nil {
			t.Skip("mosquitto is not installed: apt-get install mosquitto")
		}
		mosquitto = "/usr/sbin/mosquitto"
	}
	conf := filepath.Join(t.TempDir(), "mosquitto.conf")
	var text string
	for _, addr := range []string{fab.CloudMQTT, fab.CloudLocal} {
		a := split(addr)
		text += fmt.Sprintf("listener %s %s\n", a[3], a[1])
	}
	// The test is about the fabric on MQTT semantics alone; access is that broker's.
	text += "allow_anonymous true\npersistence false\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil { // readable: mosquitto drops its rights
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	fab.Cloud.Stop()
	t.Cleanup(func() { startCloud(t) })
	broker, err := fab.StartProgram(ctx, "mosquitto", mosquitto, fab.CloudLocal, "-c", conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { broker.Stop() })
	if err := fab.StartBridge(ctx, "mqtt://"+fab.CloudMQTT, cloudArgs[:2]...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fab.Cloud.Stop() })

	s := newSite(t, "x-external")
	s.slave.Set("input", levelInput, 9)
	s.reading(fab.CloudLocal, "level", value("9"))
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"speed":33}}}`)
	s.register(speedHolding, 33)
	s.agree()
	events := watch(t, fab.CloudLocal, "fl/"+s.edge.Node+"/event/#")
	eventually(t, "events come through", func() (string, bool) {
		if err := publish(s.edge.Bus, "fl/"+s.edge.Node+"/event/alarm", "dry run"); err != nil {
			t.Fatal(err)
		}
		return "", len(events.lines) > 0
	})

	broker.Kill() // with all it held, as it has no persistence
	if err := s.set("speed", "34"); err != nil {
		t.Fatal(err)
	}
	if broker, err = fab.StartProgram(ctx, "mosquitto", mosquitto, fab.CloudLocal, "-c", conf); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 34)
	s.reading(fab.CloudLocal, "speed", value("34"))
	s.agree()
}
