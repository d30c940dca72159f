package broker

import (
	"bytes"
	"encoding/binary"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
)

// Most of what a broker sends is PUBLISH and PUBACK. Those two are encoded here,
// many into one buffer for one write; all else is mochi's.

// appendAck adds an acknowledgement that is a success.
func appendAck(buf []byte, kind byte, id uint16) []byte {
	first := kind << 4
	if kind == packets.Pubrel {
		first |= 2 // [MQTT-3.6.1-1]
	}
	return append(buf, first, 2, byte(id>>8), byte(id))
}

// outPublish is a PUBLISH as one client gets it.
type outPublish struct {
	m      *Message
	qos    byte
	retain bool
	dup    bool
	id     uint16
	subIDs []int
	alias  uint16 // 0 for none
	bare   bool   // the client knows the alias: without the topic
}

// append adds the packet and gives its size.
func (p *outPublish) append(buf []byte, v5 bool, now time.Time) ([]byte, int) {
	first := packets.Publish<<4 | p.qos<<1
	if p.retain {
		first |= 1
	}
	if p.dup && p.qos > 0 {
		first |= 8
	}
	topic := string(p.m.Topic)
	if p.bare {
		topic = ""
	}
	size := 2 + len(topic) + len(p.m.Payload)
	if p.qos > 0 {
		size += 2
	}
	props := 0
	if v5 {
		props = p.propsSize()
		size += uvarintSize(props) + props
	}
	start := len(buf)
	buf = append(buf, first)
	buf = binary.AppendUvarint(buf, uint64(size)) // MQTT's variable byte integer is the same
	buf = appendString(buf, topic)
	if p.qos > 0 {
		buf = binary.BigEndian.AppendUint16(buf, p.id)
	}
	if v5 {
		buf = binary.AppendUvarint(buf, uint64(props))
		buf = p.appendProps(buf, now)
	}
	buf = append(buf, p.m.Payload...)
	return buf, len(buf) - start
}

func (p *outPublish) propsSize() int {
	m, n := p.m, 0
	if m.Props.PayloadFormat != nil {
		n += 2
	}
	if m.Expires > 0 {
		n += 5
	}
	if s := m.Props.ContentType; s != "" {
		n += 3 + len(s)
	}
	if s := m.Props.ResponseTopic; s != "" {
		n += 3 + len(s)
	}
	if b := m.Props.CorrelationData; len(b) > 0 {
		n += 3 + len(b)
	}
	for _, id := range p.subIDs {
		n += 1 + uvarintSize(id)
	}
	if p.alias > 0 {
		n += 3
	}
	for _, u := range m.Props.User {
		n += 5 + len(u[0]) + len(u[1])
	}
	return n
}

func (p *outPublish) appendProps(buf []byte, now time.Time) []byte {
	m := p.m
	if f := m.Props.PayloadFormat; f != nil {
		buf = append(buf, packets.PropPayloadFormat, *f)
	}
	if m.Expires > 0 { // what is left of it [MQTT-3.3.2-6]
		left := max((m.Expires-now.UnixMilli()+999)/1000, 1)
		buf = binary.BigEndian.AppendUint32(append(buf, packets.PropMessageExpiryInterval), uint32(left))
	}
	if s := m.Props.ContentType; s != "" {
		buf = appendString(append(buf, packets.PropContentType), s)
	}
	if s := m.Props.ResponseTopic; s != "" {
		buf = appendString(append(buf, packets.PropResponseTopic), s)
	}
	if b := m.Props.CorrelationData; len(b) > 0 {
		buf = appendString(append(buf, packets.PropCorrelationData), b)
	}
	for _, id := range p.subIDs {
		buf = binary.AppendUvarint(append(buf, packets.PropSubscriptionIdentifier), uint64(id))
	}
	if p.alias > 0 {
		buf = binary.BigEndian.AppendUint16(append(buf, packets.PropTopicAlias), p.alias)
	}
	for _, u := range m.Props.User {
		buf = appendString(appendString(append(buf, packets.PropUser), u[0]), u[1])
	}
	return buf
}

func appendString[S string | []byte](buf []byte, s S) []byte {
	buf = binary.BigEndian.AppendUint16(buf, uint16(len(s)))
	return append(buf, s...)
}

func uvarintSize(n int) int {
	size := 1
	for n >= 0x80 {
		n >>= 7
		size++
	}
	return size
}

// encode is any other packet, as mochi writes it for a client.
func (c *conn) encode(pk packets.Packet) []byte {
	pk.ProtocolVersion = c.cl.Properties.ProtocolVersion
	p := &c.cl.Properties.Props
	pk.Mods.MaxSize = p.MaximumPacketSize
	pk.Mods.DisallowProblemInfo = p.RequestProblemInfoFlag && p.RequestProblemInfo == 0 // [MQTT-3.1.2-29]
	var buf bytes.Buffer
	var err error
	switch pk.FixedHeader.Type {
	case packets.Puback:
		err = pk.PubackEncode(&buf)
	case packets.Pubrec:
		err = pk.PubrecEncode(&buf)
	case packets.Pubrel:
		pk.FixedHeader.Qos = 1
		err = pk.PubrelEncode(&buf)
	case packets.Pubcomp:
		err = pk.PubcompEncode(&buf)
	case packets.Suback:
		err = pk.SubackEncode(&buf)
	case packets.Unsuback:
		err = pk.UnsubackEncode(&buf)
	case packets.Pingresp:
		err = pk.PingrespEncode(&buf)
	case packets.Disconnect:
		err = pk.DisconnectEncode(&buf)
	}
	if err != nil || pk.Mods.MaxSize > 0 && uint32(buf.Len()) > pk.Mods.MaxSize {
		return nil
	}
	return buf.Bytes()
}

// queued is the record of an entry for the store.
func queued(m *Message, n uint64, qos byte, retain bool, subIDs []int, share string) store.Queued {
	return store.Queued{
		N: n, QoS: qos, Retain: retain, SubIDs: subIDs, Share: share,
		Topic: string(m.Topic), Payload: m.Payload, Expires: m.Expires, Props: m.Props,
	}
}
