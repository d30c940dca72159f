package twin

import (
	"context"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	modbusStatus = `{"uid":"` + uid + `","rev":1790000000000,"state":"Online","since":1790000000000,"mapper":"modbus"}`
	awayStatus   = `{"uid":"` + uid + `","rev":1790000000000,"state":"Offline","since":1790000010500,"error":"mapper modbus is not connected to the node's bus","mapper":"modbus"}`
	awayReading  = `{"v":null,"lv":3.5,"t":1790000010500,"q":"bad:stale","ack":7}`
)

// mapper connects as the mapper modbus; there are n of it then.
func (b *bus) mapper(id string, n int) (c *client.Client, leave func()) {
	b.t.Helper()
	c, _, leave = b.dialAs("mapper", id)
	b.mappers(n)
	return c, leave
}

// mappers waits until the engine knows of n connections of the mapper modbus.
func (b *bus) mappers(n int) {
	b.t.Helper()
	eventually(b.t, "the engine knows who is there", func() bool {
		is := -1
		err := b.Do(context.Background(), func() []broker.Message { is = b.engine.present["modbus"]; return nil })
		return err == nil && is == n
	})
}

// pass moves the clock and waits until the engine has done what was due. That
// shows in a target of another device, which ends at that time.
func (b *bus) pass(to int64) {
	b.t.Helper()
	d := pump()
	d.Name = "clock"
	b.cloud(topic.DesiredDevice(node, "default", "clock"), d)
	err := b.Publish(b.t.Context(), broker.Message{Topic: topic.Set(node, "default", "clock", "speed"), Payload: []byte(`{"v":1,"exp":` + ms(to) + `}`), QoS: 1})
	if err != nil {
		b.t.Fatal(err)
	}
	b.at(to)
	eventually(b.t, "the clock's target ended", func() bool {
		_, ok := b.Retained(topic.ReportedTarget(node, "default", "clock", "speed"))
		return !ok
	})
	b.cloud(topic.DesiredDevice(node, "default", "clock"), nil)
}

func (b *bus) stored(at topic.Topic, want string) bool {
	p, _ := b.Retained(at)
	return string(p) == want
}

// A mapper that stays away takes the life out of its devices, and only out of its own.
func TestMapperAway(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	other := pump()
	other.Name = "pump-2"
	b.cloud(topic.DesiredDevice(node, "default", "pump-2"), other)
	otherTwin := topic.ReportedTwin(node, "default", "pump-2", "pressure")
	b.wish("speed", "40", 5)
	m, leave1 := b.mapper("1", 1)
	_, leave2 := b.mapper("2", 2)
	for x, p := range map[topic.Topic]string{
		statusTopic: modbusStatus,
		topic.ReportedDevice(node, "default", "pump-2"): strings.Replace(modbusStatus, "modbus", "serial", 1),
		twinTopic("pressure"):                           `{"v":3.5,"t":1790000000001,"ack":7}`,
		twinTopic("run"):                                `{"v":null,"t":1790000000001,"ack":7}`,
		twinTopic("mode"):                               `{"v":null,"lv":1,"t":1790000000001,"q":"bad:timeout"}`,
		otherTwin:                                       `{"v":1,"t":1790000000001}`,
	} {
		if err := m.Publish(t.Context(), client.Message{Topic: x, Payload: []byte(p), QoS: 1, Retain: true}); err != nil {
			t.Fatal(err)
		}
	}
	all := func() string {
		var out []string
		for _, m := range b.RetainedMatch(topic.Reported.All(node)) {
			out = append(out, string(m.Topic)+" "+string(m.Payload))
		}
		return strings.Join(out, "\n")
	}
	was := all()
	leave1()
	b.mappers(1) // the second connection still serves
	b.pass(500)
	leave2()
	b.mappers(0)
	b.pass(10_499)
	if is := all(); is != was {
		t.Fatalf("a mapper's absence showed early:\n%s", is)
	}
	b.pass(10_500)
	if !b.stored(statusTopic, awayStatus) {
		t.Errorf("the device is not offline:\n%s", all())
	}
	is := all()
	for _, want := range []string{
		"pump-1/pressure " + awayReading,
		`pump-1/run {"v":null,"t":1790000000001,"ack":7}`,
		`pump-1/mode {"v":null,"lv":1,"t":1790000000001,"q":"bad:timeout"}`,
		`pump-2/pressure {"v":1,"t":1790000000001}`,
		`"state":"Online","since":1790000000000,"mapper":"serial"`,
		string(targetTopic("speed")),
	} {
		if !strings.Contains(is, want) {
			t.Errorf("want %s in\n%s", want, is)
		}
	}

	// A restart finds it so, and says nothing new; but it waits for every mapper.
	b.stop()
	b = start(t, b.dir, began+20_000)
	if got := all(); got != is {
		t.Errorf("after the restart:\n%s", got)
	}
	b.pass(40_000)
	if !b.stored(statusTopic, awayStatus) {
		t.Errorf("said again:\n%s", all())
	}
	if !b.stored(otherTwin, `{"v":null,"lv":1,"t":1790000040000,"q":"bad:stale"}`) {
		t.Errorf("the serial mapper never came, and its device looks alive:\n%s", all())
	}
}

// A mapper that is back in time was never away.
func TestMapperBackInTime(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	m, leave := b.mapper("1", 1)
	if err := m.Publish(t.Context(), client.Message{Topic: statusTopic, Payload: []byte(modbusStatus), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	leave()
	b.mappers(0)
	b.pass(9_000)
	b.mapper("1", 1)
	b.pass(60_000)
	if !b.stored(statusTopic, modbusStatus) {
		p, _ := b.Retained(statusTopic)
		t.Errorf("the status is %s", p)
	}
}
