package client

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"
)

// The properties travel both ways, and size knows what they take.
func TestProperties(t *testing.T) {
	text := byte(1)
	for _, m := range []Message{
		{},
		{ContentType: "text/plain"},
		{PayloadFormat: &text},
		{Expiry: 3600},
		{User: [][2]string{{"a", "1"}, {"a", ""}, {"b", "3"}}},
		{ResponseTopic: "re", CorrelationData: []byte{1}, ContentType: "c", PayloadFormat: &text, Expiry: 1, User: [][2]string{{"a", "b"}}},
	} {
		m.Topic, m.Payload, m.QoS = "a/b", []byte("payload"), 1
		p := &paho.Publish{Topic: string(m.Topic), Payload: m.Payload, QoS: m.QoS, Properties: properties(&m)}
		var wire bytes.Buffer
		n, err := p.Packet().WriteTo(&wire)
		if err != nil || uint64(n) != size(&m) {
			t.Errorf("%+v has %d bytes, size says %d (%v)", m, n, size(&m), err)
		}
		pk, err := packets.ReadPacket(&wire)
		if err != nil {
			t.Fatal(err)
		}
		if got := fromPaho(paho.PublishFromPacketPublish(pk.Content.(*packets.Publish))); !reflect.DeepEqual(got, m) {
			t.Errorf("got\n%+v, want\n%+v", got, m)
		}
	}
}
