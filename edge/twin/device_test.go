package twin

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// reported lists what is reported of devices, without the common beginning.
func (b *bus) reported() string {
	b.t.Helper()
	var out []string
	for _, m := range b.RetainedMatch(topic.Reported.All(node)) {
		out = append(out, strings.TrimPrefix(string(m.Topic), "fl/"+node+"/reported/"))
	}
	return strings.Join(out, " ")
}

func (b *bus) wantReported(want ...string) {
	b.t.Helper()
	if got := b.reported(); got != strings.Join(want, " ") {
		b.t.Errorf("reported:\n got %s\nwant %s", got, strings.Join(want, " "))
	}
}

const goodStatus = `{"uid":"` + uid + `","rev":1790000000000,"state":"Online","since":1790000000000}`

// served makes a device with everything that can be reported of one.
func served(t *testing.T, b *bus) {
	t.Helper()
	b.cloud(deviceTopic, pump())
	b.wish("speed", "40", 5)
	b.mustSet("mode", "1")
	for x, p := range map[topic.Topic]string{
		twinTopic("speed"): `{"v":12,"t":1790000000001}`, twinTopic("pressure"): `{"v":3.5,"t":1790000000001}`, statusTopic: goodStatus,
	} {
		if err := b.report(x, p); err != nil {
			t.Fatal(err)
		}
	}
	b.wantReported("device/default/pump-1", "target/default/pump-1/mode", "target/default/pump-1/speed",
		"twin/default/pump-1/pressure", "twin/default/pump-1/speed")
}

// Wishes settle when their device comes, in whatever order the two come.
func TestDeviceAfterItsWish(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.wish("speed", "40", 5)
	b.wish("mode", "1", 5, 10)
	b.wish("label", `"a"`, 5)
	b.cloud(wishTopic("label"), nil)
	wantTarget(t, b, "speed", nil)
	b.at(20)
	b.cloud(deviceTopic, pump())
	wantTarget(t, b, "speed", target("40", 5, 20, payload.ByCloud))
	wantTarget(t, b, "mode", nil) // too late
	wantTarget(t, b, "label", nil)
}

func TestPropertyAfterItsWish(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, without(pump(), "speed"))
	b.wish("speed", "40", 5)
	wantTarget(t, b, "speed", nil)
	b.cloud(deviceTopic, pump())
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud))
}

func TestDeviceChanged(t *testing.T) {
	b := start(t, t.TempDir(), began)
	served(t, b)

	// A change that does not concern it leaves a property alone.
	d := pump()
	d.Rev++
	d.Modbus = &device.ModbusDevice{Address: "10.0.0.1:502"}
	b.cloud(deviceTopic, d)
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud))
	b.wantReported("device/default/pump-1", "target/default/pump-1/mode", "target/default/pump-1/speed",
		"twin/default/pump-1/pressure", "twin/default/pump-1/speed")

	// A property that went takes its value and its target with it.
	d = without(d, "speed")
	b.cloud(deviceTopic, d)
	b.wantReported("device/default/pump-1", "target/default/pump-1/mode", "twin/default/pump-1/pressure")
	wantRefused(t, b.report(twinTopic("speed"), `{"v":12,"t":1790000000002}`), 0x90, "property")
	wantRefused(t, b.set("speed", "4"), 0x90, "property")

	// One that cannot be written any more keeps its value.
	if err := b.report(twinTopic("mode"), `{"v":1,"t":1790000000002}`); err != nil {
		t.Fatal(err)
	}
	for i := range d.Properties {
		if d.Properties[i].Name == "mode" {
			d.Properties[i].Access = device.ReadOnly
		}
	}
	d.Rev++
	b.cloud(deviceTopic, d)
	b.wantReported("device/default/pump-1", "twin/default/pump-1/mode", "twin/default/pump-1/pressure")
}

// An end that was noted for a target goes with the target.
func TestExpiryGoesWithItsProperty(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	b.mustSet("speed", `{"v":35,"exp":`+ms(60)+`}`)
	b.mustSet("mode", `{"v":1,"exp":`+ms(60)+`}`)
	b.cloud(deviceTopic, without(pump(), "speed"))
	b.cloud(deviceTopic, pump())
	b.mustSet("speed", "36")
	b.at(60)
	awaitTarget(t, b, "mode", nil)
	if g := b.target("speed"); g == nil || string(g.V) != "36" {
		t.Errorf("the target is %s", show(g))
	}
}

func TestDeviceRemoved(t *testing.T) {
	b := start(t, t.TempDir(), began)
	served(t, b)
	b.cloud(deviceTopic, nil)
	b.wantReported()
	// What comes late does not bring it back.
	wantRefused(t, b.report(twinTopic("speed"), `{"v":12,"t":1790000000002}`), 0x90, "device", "default/pump-1")
	wantRefused(t, b.report(statusTopic, goodStatus), 0x90, "device")
	wantRefused(t, b.set("speed", "4"), 0x90, "device")
	b.wish("speed", "41", 50)
	b.wantReported()
	// Clearing is harmless.
	if err := b.report(twinTopic("speed"), ""); err != nil {
		t.Error(err)
	}
	if err := b.report(statusTopic, ""); err != nil {
		t.Error(err)
	}
	b.stop()
	start(t, b.dir, began).wantReported()
}

// Another device of the same name begins from nothing.
func TestDeviceRecreated(t *testing.T) {
	b := start(t, t.TempDir(), began)
	served(t, b)
	d := pump()
	d.UID = uid2
	d.Rev++
	b.cloud(deviceTopic, d)
	b.wantReported()
	// The old one's wishes are still on their way, or still there.
	b.wish("speed", "41", 50)
	b.wantReported()
	wantRefused(t, b.report(statusTopic, goodStatus), 0x90, "device", uid2)

	b.at(60)
	b.cloud(wishTopic("speed"), payload.Wish{V: json.RawMessage("42"), Rev: began + 1, UID: uid2})
	g := b.target("speed")
	if g == nil || g.UID != uid2 || string(g.V) != "42" || g.CloudRev() != 1 {
		t.Errorf("the target is %s", show(g))
	}
}

// The new device's wish may come before the device itself.
func TestDeviceRecreatedAfterItsWish(t *testing.T) {
	b := start(t, t.TempDir(), began)
	served(t, b)
	b.cloud(wishTopic("speed"), payload.Wish{V: json.RawMessage("42"), Rev: began + 9, UID: uid2})
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud)) // the old one is still served
	d := pump()
	d.UID = uid2
	b.cloud(deviceTopic, d)
	b.wantReported("target/default/pump-1/speed")
	if g := b.target("speed"); g.UID != uid2 || string(g.V) != "42" || g.Rev != 9 {
		t.Errorf("the target is %s", show(g))
	}
}

// A restart without the cloud brings devices, targets and ends back.
func TestRestart(t *testing.T) {
	b := start(t, t.TempDir(), began)
	served(t, b)
	b.mustSet("label", `{"v":"a","exp":`+ms(600)+`}`)
	before := b.reported()
	b.stop()

	b = start(t, b.dir, began+100)
	if got := b.reported(); got != before {
		t.Errorf("reported:\n got %s\nwant %s", got, before)
	}
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud))
	wantTarget(t, b, "mode", target("1", 0, 0, payload.ByLocal))
	wantTarget(t, b, "label", target(`"a"`, 0, 0, payload.ByLocal, until(600)))
	wantRefused(t, b.set("speed", "4000"), 0x83, "range")
	b.at(600)
	awaitTarget(t, b, "label", nil)
}

// What a device left behind, when the store has more than it should, goes at
// the start: before anybody sees it.
func TestOrphans(t *testing.T) {
	dir := t.TempDir()
	b := open(t, dir, began) // the engine knows nothing yet and takes everything
	put := func(x topic.Topic, v any) {
		t.Helper()
		err := b.Do(t.Context(), func() []broker.Message { return []broker.Message{retained(x, payload.Encode(v))} })
		if err != nil {
			t.Fatal(err)
		}
	}
	tgt := payload.Target{V: json.RawMessage("1"), Rev: began, UID: uid, By: payload.ByLocal, T: began, Exp: began + 60}
	put(deviceTopic, pump())
	put(targetTopic("speed"), tgt)
	put(targetTopic("pressure"), tgt) // read only
	put(targetTopic("gone"), tgt)
	put(twinTopic("pressure"), payload.Reading{V: json.RawMessage("1"), T: began})
	put(twinTopic("gone"), payload.Reading{V: json.RawMessage("1"), T: began})
	foreign := tgt
	foreign.UID = uid2
	put(targetTopic("mode"), foreign)
	for _, x := range []topic.Topic{topic.ReportedTarget(node, "default", "old", "p"), topic.ReportedTwin(node, "default", "old", "p"), topic.ReportedDevice(node, "default", "old")} {
		put(x, tgt)
	}
	put(topic.ReportedNode(node), payload.Node{})
	if err := b.engine.Start(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b.wantReported("node", "target/default/pump-1/speed", "twin/default/pump-1/pressure")
	b.run()
	b.at(60)
	awaitTarget(t, b, "speed", nil)
}

// A stored device that cannot be read costs that device, not the start.
func TestStartWithAnUnreadableDevice(t *testing.T) {
	b := open(t, t.TempDir(), began)
	err := b.Do(t.Context(), func() []broker.Message {
		return []broker.Message{
			retained(topic.DesiredDevice(node, "default", "bad"), []byte(`{"uid":`)),
			retained(deviceTopic, payload.Encode(pump())),
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.engine.Start(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b.mustSet("speed", "40")
	if log := b.log.String(); !strings.Contains(log, "stored device cannot be read") || !strings.Contains(log, "default/bad") {
		t.Errorf("the log does not name it:\n%s", log)
	}
}
