package broker_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// Flags of the long runs; CI uses the defaults.
var (
	seedFlag   = flag.Uint64("seed", 0, "seed of the crash suite, the model-based test and the soak; 0 is a new one each time")
	roundsFlag = flag.Int("rounds", 0, "rounds of the crash suite, or seeds of the model-based test; 0 is the number for CI")
	soakFlag   = flag.Duration("soak", 0, "run the soak for so long")
)

// seed is the seed of this run.
func seed() uint64 {
	if *seedFlag != 0 {
		return *seedFlag
	}
	return uint64(time.Now().UnixNano())
}

// wire is one MQTT connection, for clients that follow the protocol from its
// first packet to its last: nothing in it fails a test, so that it may be used
// from any goroutine.
type wire struct {
	net.Conn
	v       byte
	r       *bufio.Reader
	aliases map[uint16]string
}

func newWire(c net.Conn, v byte) *wire {
	return &wire{Conn: c, v: v, r: bufio.NewReader(c), aliases: map[uint16]string{}}
}

func (w *wire) send(pk packets.Packet) error {
	_, err := w.Write(marshal(w.v, pk))
	return err
}

// marshal panics on a packet that cannot be encoded: that is the test's mistake.
func marshal(v byte, pk packets.Packet) []byte {
	pk.ProtocolVersion = v
	var b bytes.Buffer
	var err error
	switch pk.FixedHeader.Type {
	case packets.Connect:
		err = pk.ConnectEncode(&b)
	case packets.Publish:
		err = pk.PublishEncode(&b)
	case packets.Puback:
		err = pk.PubackEncode(&b)
	case packets.Pubrec:
		err = pk.PubrecEncode(&b)
	case packets.Pubrel:
		pk.FixedHeader.Qos = 1
		err = pk.PubrelEncode(&b)
	case packets.Pubcomp:
		err = pk.PubcompEncode(&b)
	case packets.Subscribe:
		pk.FixedHeader.Qos = 1
		err = pk.SubscribeEncode(&b)
	case packets.Unsubscribe:
		pk.FixedHeader.Qos = 1
		err = pk.UnsubscribeEncode(&b)
	case packets.Disconnect:
		err = pk.DisconnectEncode(&b)
	default:
		err = fmt.Errorf("no encoder for packet type %d", pk.FixedHeader.Type)
	}
	if err != nil {
		panic(err)
	}
	return b.Bytes()
}

// next reads a packet; topic aliases are resolved.
func (w *wire) next() (packets.Packet, error) {
	var pk packets.Packet
	b, err := w.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(b); err != nil {
		return pk, fmt.Errorf("first byte 0x%02x: %w", b, err)
	}
	n, _, err := packets.DecodeLength(w.r)
	if err != nil {
		return pk, err
	}
	pk.FixedHeader.Remaining = n
	body := make([]byte, n)
	if _, err := io.ReadFull(w.r, body); err != nil {
		return pk, err
	}
	pk.ProtocolVersion = w.v
	switch pk.FixedHeader.Type {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
		if a := pk.Properties.TopicAlias; err == nil && pk.Properties.TopicAliasFlag {
			if pk.TopicName != "" {
				w.aliases[a] = pk.TopicName
			} else if pk.TopicName = w.aliases[a]; pk.TopicName == "" {
				err = fmt.Errorf("topic alias %d was never given", a)
			}
		}
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubrel:
		err = pk.PubrelDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		err = pk.UnsubackDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	}
	if err != nil {
		err = fmt.Errorf("packet type %d: %w", pk.FixedHeader.Type, err)
	}
	return pk, err
}

// note is an acknowledgement, or PUBREL.
func note(kind byte, id uint16) packets.Packet {
	return packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
}

// forever is the session expiry interval of a session that never ends.
const forever = ^uint32(0)

// hello is a CONNECT. In MQTT 3.1.1 expiry is 0 or forever.
func hello(v byte, id string, clean bool, expiry uint32, change ...func(*packets.Packet)) packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect:     packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: clean, ClientIdentifier: id},
	}
	if v == 5 {
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = expiry, expiry > 0
	}
	for _, c := range change {
		c(&pk)
	}
	return pk
}

// onMem opens a broker in memory, whose every client is a local one.
func onMem(fs vfs.FS, change ...func(*broker.Options)) (*broker.Broker, error) {
	o := broker.Options{
		Dir: "/store", Node: pump,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{Role: access.Local}, nil },
	}
	o.Store.FS, o.Store.ReserveBytes = fs, -1
	for _, c := range change {
		c(&o)
	}
	return broker.Open(o)
}

// matches is the rule of topic filters [MQTT 5, 4.7], written apart from the
// product's: what is compared must not come from one source.
func matches(filter, topic string) bool {
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if topic[0] == '$' && (f[0] == "+" || f[0] == "#") {
		return false
	}
	for i, level := range f {
		switch {
		case level == "#":
			return true
		case i >= len(t), level != "+" && level != t[i]:
			return false
		}
	}
	return len(f) == len(t)
}
