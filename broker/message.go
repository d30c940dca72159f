package broker

import (
	"fmt"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Message is an application message inside the broker. Its byte slices are not
// changed by anybody once it was handed over.
type Message struct {
	Topic   topic.Topic
	Payload []byte
	QoS     byte
	Retain  bool
	// Expires is when the message dies, in milliseconds since 1970; 0 is never.
	Expires int64
	Props   store.Props

	// From and ClientID are the publisher's; zero for the process itself.
	From     access.Identity
	ClientID string

	seq uint64 // given by the core to retained messages; 0 from the store
}

// size is what the message weighs in a queue.
func (m *Message) size() int {
	n := 256 + len(m.Topic) + len(m.Payload) + len(m.Props.ContentType) + len(m.Props.ResponseTopic) + len(m.Props.CorrelationData)
	for _, u := range m.Props.User {
		n += 32 + len(u[0]) + len(u[1])
	}
	return n
}

func (m *Message) expired(now time.Time) bool {
	return m.Expires != 0 && m.Expires <= now.UnixMilli()
}

// Refusal is a negative acknowledgement: an MQTT 5 reason code of 0x80 or more
// and the reason string that the publisher gets.
type Refusal struct {
	Code   byte
	Reason string // for the publisher, a sentence
	Kind   string // for the counter, a word
}

func (r *Refusal) Error() string { return fmt.Sprintf("refused (0x%02x): %s", r.Code, r.Reason) }

// Reason codes of negative acknowledgements [MQTT-3.4.2.1].
const (
	CodeUnspecified    = 0x80
	CodeImplementation = 0x83
	CodeNotAuthorized  = 0x87
	CodeTopicInvalid   = 0x90
	CodeQuotaExceeded  = 0x97
	CodePayloadFormat  = 0x99

	codeMalformed      = 0x81
	codePacketTooLarge = 0x95
)

// Interceptor sees every message on the core before it is stored. It may refuse
// it with a *[Refusal] and may add messages that are stored in the same batch
// and published with it, even where it refuses. It must not block, and reads
// the retained state with [Broker.Retained].
//
// What it saw may still come to nothing, when the store refuses the batch. One
// that keeps a memory of what it saw implements [Undoer] as well.
type Interceptor interface {
	Intercept(m *Message) (also []Message, err error)
}

// Undoer is an [Interceptor] with a memory. Undone tells it, on the core, that
// messages that it let pass were not stored after all: the retained state is
// what counts.
type Undoer interface {
	Undone()
}

// Durability says when a retained message must be on the disk.
type Durability uint8

const (
	// Sync means before the acknowledgement.
	Sync Durability = iota
	// NoSync means handed to the operating system; what a power cut takes, a digest brings back.
	NoSync
	// Checkpoint means in memory, written every Options.Checkpoint and at Close.
	// For readings, which their mapper reads again anyway.
	Checkpoint
	// memory is for what the broker says of itself.
	memory
)

// EdgeDurability is the rule of an edge node: readings are checkpointed, and so
// is the node's description, which every start makes anew and which must get out
// when the disk takes nothing any more; everything else is synced.
func EdgeDurability(t topic.Topic) Durability {
	p, err := topic.Parse(string(t))
	if err == nil && (p.Kind == topic.KindReportedTwin || p.Kind == topic.KindReportedNode) {
		return Checkpoint
	}
	return Sync
}

// CloudDurability is the rule of the cloud broker: fabric state needs no sync,
// users' messages do.
func CloudDurability(t topic.Topic) Durability {
	if topic.Owned(string(t)) {
		return NoSync
	}
	return Sync
}

func fromPacket(pk *packets.Packet) *Message {
	m := &Message{
		Topic:   topic.Topic(pk.TopicName),
		Payload: pk.Payload,
		QoS:     pk.FixedHeader.Qos,
		Retain:  pk.FixedHeader.Retain,
		Props:   props(&pk.Properties),
	}
	m.Expires = expires(pk.Properties.MessageExpiryInterval)
	return m
}

func props(from *packets.Properties) store.Props {
	p := store.Props{
		ContentType:     from.ContentType,
		ResponseTopic:   from.ResponseTopic,
		CorrelationData: from.CorrelationData,
	}
	if from.PayloadFormatFlag {
		f := from.PayloadFormat
		p.PayloadFormat = &f
	}
	for _, u := range from.User {
		p.User = append(p.User, [2]string{u.Key, u.Val})
	}
	return p
}

// expires turns an expiry interval in seconds into a time; 0 is never.
func expires(seconds uint32) int64 {
	if seconds == 0 {
		return 0
	}
	return time.Now().Add(time.Duration(seconds) * time.Second).UnixMilli()
}

// fromWill makes a message of a CONNECT's Will, as it will be published.
func fromWill(w *store.Will) Message {
	return Message{
		Topic: topic.Topic(w.Topic), Payload: w.Payload, QoS: w.QoS, Retain: w.Retain,
		Expires: expires(w.Expiry), Props: w.Props, ClientID: w.ClientID,
	}
}
