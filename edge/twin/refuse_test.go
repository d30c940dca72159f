package twin

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// What a local client may not wish is refused on the wire, with a reason code
// and a sentence, on the response topic too, and counted. Nothing is driven by it.
func TestSetRefused(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	c, msgs := b.dial("", client.Subscription{Filter: "answers/#", QoS: 1})
	elsewhere := topic.Set(node, "default", "pump-9", "speed")
	for _, x := range []struct {
		name    string
		topic   topic.Topic
		payload string
		code    byte
		kind    string
		words   string
	}{
		{"type: a text for a number", setTopic("speed"), `"fast"`, 0x99, "type", "speed"},
		{"type: a fraction", setTopic("speed"), `1.5`, 0x99, "type", "whole number"},
		{"type: null", setTopic("speed"), `null`, 0x99, "type", "null"},
		{"type: a list", setTopic("speed"), `[1]`, 0x99, "type", "uint16"},
		{"type: a number for a bool", setTopic("run"), `1`, 0x99, "type", "bool"},
		{"type: an object in the long form", setTopic("speed"), `{"v":{"x":1}}`, 0x99, "type", "uint16"},
		{"range: above the type", setTopic("speed"), `70000`, 0x83, "range", "uint16"},
		{"range: above the maximum", setTopic("speed"), `4000`, 0x83, "range", "4000 is above the maximum 3000 rpm"},
		{"range: below zero", setTopic("speed"), `-1`, 0x83, "range", "-1"},
		{"range: above 2^64", setTopic("energy"), `"18446744073709551616"`, 0x83, "range", "uint64"},
		{"range: too long", setTopic("label"), `"abcde"`, 0x83, "range", "5 bytes"},
		{"enum", setTopic("mode"), `2`, 0x83, "enum", "[0,1]"},
		{"access", setTopic("pressure"), `4`, 0x87, "access", "read only"},
		{"access comes before the value", setTopic("pressure"), `"x"`, 0x87, "access", "read only"},
		{"property", setTopic("sped"), `4`, 0x90, "property", "speed"},
		{"device", elsewhere, `4`, 0x90, "device", "default/pump-9"},
		{"payload: none", setTopic("speed"), ``, 0x99, "payload", "not JSON"},
		{"payload: blank", setTopic("speed"), ` `, 0x99, "payload", "not JSON"},
		{"payload: no quotes", setTopic("label"), `auto`, 0x99, "payload", "quotes"},
		{"payload: cut off", setTopic("speed"), `{"v":4`, 0x99, "payload", "not JSON"},
		{"payload: two values", setTopic("speed"), `4 5`, 0x99, "payload", "not JSON"},
		{"payload: no v", setTopic("speed"), `{}`, 0x99, "payload", `"v"`},
		{"payload: a typo in exp", setTopic("speed"), `{"v":4,"expires":1790000099000}`, 0x99, "payload", "expires"},
		{"payload: exp is a text", setTopic("speed"), `{"v":4,"exp":"tomorrow"}`, 0x99, "payload", "exp"},
		{"payload: exp has a fraction", setTopic("speed"), `{"v":4,"exp":1790000099000.5}`, 0x99, "payload", "exp"},
		{"payload: exp is beyond 64 bits", setTopic("speed"), `{"v":4,"exp":99999999999999999999}`, 0x99, "payload", "exp"},
		{"payload: no UTF-8", setTopic("speed"), "\xff\xfe", 0x99, "payload", "not JSON"},
		{"expired", setTopic("speed"), `{"v":4,"exp":` + ms(0) + `}`, 0x83, "expired", "in the past"},
		{"expired: seconds in place of milliseconds", setTopic("speed"), `{"v":4,"exp":1790000099}`, 0x83, "expired", "milliseconds since 1970"},
		{"conflict", setTopic("speed"), `{"v":4,"if":1}`, 0x83, "conflict", "somebody wished in between"},
	} {
		t.Run(x.name, func(t *testing.T) {
			before := b.count("fairlead_twin_wishes_refused_total", x.kind)
			err := c.Publish(t.Context(), client.Message{
				Topic: x.topic, Payload: []byte(x.payload), QoS: 1,
				ResponseTopic: "answers/1", CorrelationData: []byte(x.name),
			})
			var r *client.Refused
			if !errors.As(err, &r) {
				t.Fatalf("want a refusal, got %v", err)
			}
			if r.Code != x.code || !strings.Contains(r.Reason, x.words) {
				t.Errorf("want 0x%02x with %q, got %v", x.code, x.words, r)
			}
			if got := b.count("fairlead_twin_wishes_refused_total", x.kind); got != before+1 {
				t.Errorf("want one more %s counted, got %g after %g", x.kind, got, before)
			}
			m := next(t, msgs)
			var reply payload.SetReply
			if err := payload.Decode(m.Payload, &reply); err != nil {
				t.Fatal(err)
			}
			if m.Topic != "answers/1" || string(m.CorrelationData) != x.name || m.Retain {
				t.Errorf("the answer came as %+v", m)
			}
			if want := (payload.SetReply{Reason: x.kind, Error: r.Reason}); reply != want {
				t.Errorf("want the answer %+v, got %+v", want, reply)
			}
		})
	}
	if all := b.RetainedMatch(topic.OfKind(node, topic.KindReportedTarget)); len(all) != 0 {
		t.Errorf("a refused wish became a target: %v", all)
	}
	// The log says who and why, but not what: payloads may be secrets.
	eventually(t, "the refusals are logged", func() bool { return strings.Contains(b.log.String(), "publish refused") })
	if log := b.log.String(); !strings.Contains(log, "kind=range") || !strings.Contains(log, "client=local/red") {
		t.Errorf("the log lacks kind or client:\n%s", log)
	}
}

// Every form in which a wish is right.
func TestSetAccepted(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	c, msgs := b.dial("", client.Subscription{Filter: "answers/#", QoS: 1}, client.Subscription{Filter: topic.OfKind(node, topic.KindReportedTarget), QoS: 1})
	for _, x := range []struct{ prop, payload, v string }{
		{"speed", `40`, `40`},
		{"speed", ` 41 `, `41`},
		{"speed", `"42"`, `42`},
		{"speed", `4.3e1`, `43`},
		{"speed", `{"v":44}`, `44`},
		{"speed", `{"v":"45","exp":0,"if":0}`, `45`},
		{"label", `"a<b"`, `"a<b"`},
		{"run", `true`, `true`},
		{"recipe", `{"v":{"a": [1, 2]}}`, `{"a":[1,2]}`},
		{"recipe", `[1]`, `[1]`},
		{"recipe", `null`, `null`},
		{"energy", `18446744073709551615`, `"18446744073709551615"`},
	} {
		t.Run(x.prop+" "+x.payload, func(t *testing.T) {
			err := c.Publish(t.Context(), client.Message{
				Topic: setTopic(x.prop), Payload: []byte(x.payload), QoS: 1, ResponseTopic: "answers/1", CorrelationData: []byte(x.payload),
			})
			if err != nil {
				t.Fatal(err)
			}
			var reply payload.SetReply
			got := map[topic.Topic]client.Message{}
			for range 2 {
				m := next(t, msgs)
				got[m.Topic] = m
			}
			if err := payload.Decode(got["answers/1"].Payload, &reply); err != nil {
				t.Fatal(err)
			}
			var g payload.Target
			if err := payload.Decode(got[targetTopic(x.prop)].Payload, &g); err != nil {
				t.Fatal(err)
			}
			if !reply.OK || reply.Rev != g.Rev || reply.Rev == 0 || reply.Reason != "" {
				t.Errorf("the answer is %+v for %+v", reply, g)
			}
			if string(got["answers/1"].CorrelationData) != x.payload {
				t.Errorf("the correlation data is %q", got["answers/1"].CorrelationData)
			}
			if !bytes.Equal(g.V, []byte(x.v)) || g.By != payload.ByLocal || g.Who != "local/red" || g.UID != uid {
				t.Errorf("the target is %+v", g)
			}
			// The acknowledged target is in the topics.
			stored, _ := b.Retained(targetTopic(x.prop))
			if !bytes.Equal(stored, got[targetTopic(x.prop)].Payload) {
				t.Errorf("stored is %s", stored)
			}
		})
	}
}

// An answer goes only where its asker could have published it.
func TestReplyIsNoBackDoor(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	seen := make(chan broker.Message, 100)
	stop, err := b.Watch(t.Context(), "#", func(m broker.Message) { seen <- m })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for len(seen) > 0 {
		<-seen
	}
	c, _ := b.dial("")
	for _, answer := range []string{
		"fl", string(targetTopic("speed")), string(twinTopic("speed")), string(wishTopic("speed")), string(setTopic("speed")),
		"fl/other/reported/node", "fl/" + node + "/event/alarm", "$SYS/broker/version", "$share/x/y",
	} {
		for _, v := range []string{"40", "4000"} {
			_ = c.Publish(t.Context(), client.Message{Topic: setTopic("speed"), Payload: []byte(v), QoS: 1, ResponseTopic: answer})
			if v == "40" {
				if m := <-seen; m.Topic != setTopic("speed") {
					t.Errorf("%s: %+v", answer, m)
				}
				if m := <-seen; m.Topic != targetTopic("speed") || !m.Retain {
					t.Errorf("%s: %+v", answer, m)
				}
			}
		}
	}
	for _, answer := range []string{"a/+", "a/#", "#"} { // no client gets these past the broker's decoder
		m := broker.Message{Topic: setTopic("speed"), Payload: []byte("4000"), QoS: 1, From: access.Identity{Role: access.Local}}
		m.Props.ResponseTopic = answer
		wantRefused(t, b.Publish(t.Context(), m), 0x83, "range")
	}
	if err := c.Publish(t.Context(), client.Message{Topic: "user/end", Payload: []byte("x"), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	if m := <-seen; m.Topic != "user/end" {
		t.Errorf("an answer got through: %+v", m)
	}
}

func TestReadings(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	c, _ := b.dial("mapper")
	for _, x := range []struct {
		name    string
		topic   topic.Topic
		payload string
		code    byte // 0 is taken
		kind    string
		words   string
	}{
		{"a value", twinTopic("pressure"), `{"v":3.5,"t":1790000000123}`, 0, "", ""},
		{"outside the range is still the truth", twinTopic("pressure"), `{"v":99,"t":1790000000123}`, 0, "", ""},
		{"not of the enum is still the truth", twinTopic("mode"), `{"v":7,"t":1790000000123}`, 0, "", ""},
		{"a bad quality with the last value", twinTopic("pressure"), `{"v":null,"lv":3.5,"t":1790000000123,"q":"bad:timeout"}`, 0, "", ""},
		{"a bad quality of a new word", twinTopic("pressure"), `{"v":null,"t":1790000000123,"q":"bad:weather"}`, 0, "", ""},
		{"an ack without a value", twinTopic("run"), `{"v":null,"t":1790000000123,"ack":1790000000001}`, 0, "", ""},
		{"a json property that is null", twinTopic("recipe"), `{"v":null,"t":1790000000123}`, 0, "", ""},
		{"an unknown field", twinTopic("pressure"), `{"v":3.5,"t":1790000000123,"new":1}`, 0, "", ""},
		{"cleared", twinTopic("pressure"), ``, 0, "", ""},

		{"no time", twinTopic("pressure"), `{"v":3.5}`, 0x99, "payload", `"t"`},
		{"no value", twinTopic("pressure"), `{"t":1790000000123}`, 0x99, "payload", `"v"`},
		{"null without a quality", twinTopic("pressure"), `{"v":null,"t":1790000000123}`, 0x99, "payload", `"q"`},
		{"a value with a bad quality", twinTopic("pressure"), `{"v":0,"t":1790000000123,"q":"bad:timeout"}`, 0x99, "payload", `"lv"`},
		{"a word that is no quality", twinTopic("pressure"), `{"v":null,"t":1790000000123,"q":"uncertain"}`, 0x99, "payload", "bad:"},
		{"bare", twinTopic("pressure"), `3.5`, 0x99, "payload", "JSON object"},
		{"no JSON", twinTopic("pressure"), `{"v":`, 0x99, "payload", "want"},
		{"null", twinTopic("pressure"), `null`, 0x99, "payload", "JSON object"},
		{"another type", twinTopic("pressure"), `{"v":"high","t":1790000000123}`, 0x99, "type", "float64"},
		{"beyond the type", twinTopic("speed"), `{"v":70000,"t":1790000000123}`, 0x83, "range", "uint16"},
		{"an unknown property", twinTopic("heat"), `{"v":3.5,"t":1790000000123}`, 0x90, "property", "pressure"},
		{"an unknown device", topic.ReportedTwin(node, "default", "pump-9", "pressure"), `{"v":3.5,"t":1790000000123}`, 0x90, "device", "pump-9"},

		{"a status", statusTopic, `{"uid":"` + uid + `","rev":1,"state":"Online","since":1}`, 0, "", ""},
		{"a status of another uid", statusTopic, `{"uid":"` + uid2 + `","rev":1,"state":"Online","since":1}`, 0x90, "device", uid},
		{"a status without a state", statusTopic, `{"uid":"` + uid + `","rev":1,"since":1}`, 0x99, "payload", "Online"},
		{"a status that is no JSON", statusTopic, `Online`, 0x99, "payload", "JSON object"},
		{"a status of an unknown device", topic.ReportedDevice(node, "default", "pump-9"), `{"uid":"` + uid + `","rev":1,"state":"Online","since":1}`, 0x90, "device", "pump-9"},
	} {
		t.Run(x.name, func(t *testing.T) {
			was, _ := b.Retained(x.topic)
			before := b.count("fairlead_twin_wishes_refused_total", x.kind)
			err := c.Publish(t.Context(), client.Message{Topic: x.topic, Payload: []byte(x.payload), QoS: 1, Retain: true})
			is, _ := b.Retained(x.topic)
			if x.code == 0 {
				if err != nil || string(is) != x.payload {
					t.Fatalf("got %v and %s", err, is)
				}
				return
			}
			var r *client.Refused
			if !errors.As(err, &r) || r.Code != x.code || !strings.Contains(r.Reason, x.words) {
				t.Fatalf("want 0x%02x with %q, got %v", x.code, x.words, err)
			}
			if string(is) != string(was) {
				t.Errorf("the refused payload is stored: %s", is)
			}
			if got := b.count("fairlead_twin_wishes_refused_total", x.kind); got != before+1 {
				t.Errorf("want one more %s counted, got %g after %g", x.kind, got, before)
			}
		})
	}
}

// The reason lists what there is, but not without end.
func TestUnknownPropertyOfALargeModel(t *testing.T) {
	b := start(t, t.TempDir(), began)
	d := pump()
	d.Properties = nil
	for i := range 256 {
		d.Properties = append(d.Properties, device.Property{Name: "p" + strings.Repeat("x", 50) + string(rune('a'+i%26)), Type: device.Bool, Access: device.ReadWrite})
	}
	b.cloud(deviceTopic, d)
	err := b.set("nothing", "1")
	wantRefused(t, err, 0x90, "property", "…")
	if len(err.Error()) > 1000 {
		t.Errorf("the reason has %d characters", len(err.Error()))
	}
}

// A device that cannot be served is refused whole; the one before goes on.
func TestDeviceRefused(t *testing.T) {
	b := start(t, t.TempDir(), began)
	b.cloud(deviceTopic, pump())
	other := pump()
	other.Name = "pump-2"
	noUID := pump()
	noUID.UID = ""
	for name, v := range map[string]any{
		"no JSON": `{"uid":`, "a list": `[]`, "null": `null`, "another name": other, "no uid": noUID,
		"another type": `{"uid":"` + uid + `","namespace":"default","name":"pump-1","properties":"many"}`,
	} {
		wantRefused(t, b.tryCloud(deviceTopic, v), 0x99, "payload")
		if t.Failed() {
			t.Fatal(name)
		}
	}
	b.mustSet("speed", "40")
	if p, _ := b.Retained(deviceTopic); !bytes.Equal(p, payload.Encode(pump())) {
		t.Errorf("the device is now %s", p)
	}
}

// Topics that are nobody's here pass the engine by.
func TestOtherTopics(t *testing.T) {
	b := start(t, t.TempDir(), began)
	for _, x := range []topic.Topic{"a/b", "fl", "fl/plant-7/no/such/kind", "fl/plant-8/desired/device/default/pump-1"} {
		if err := b.Publish(context.Background(), broker.Message{Topic: x, Payload: []byte("x"), QoS: 1}); err != nil {
			t.Errorf("%s: %v", x, err)
		}
	}
}
