package broker_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) {
	if os.Getenv(child) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// child names the variable that marks a process started by alone.
const child = "FAIRLEAD_TEST_CHILD"

// alone runs the test in a process of its own and tells whether this is it: a
// store that failed leaves Pebble's goroutines behind until the process ends.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(child) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

var time0 time.Time

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// raw is a client that says exactly what a test wants it to say.
type raw struct {
	t *testing.T
	net.Conn
	r       *bufio.Reader
	v       byte
	early   []packets.Packet // messages that came before a SUBACK
	guarded bool
}

// dialRaw opens a connection without saying anything. v is 4 or 5.
func dialRaw(t *testing.T, addr string, v byte) *raw {
	t.Helper()
	d, err := client.ParseURL(addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return newRaw(t, c, v)
}

func newRaw(t *testing.T, c net.Conn, v byte) *raw {
	t.Cleanup(func() { _ = c.Close() })
	return &raw{t: t, Conn: c, r: bufio.NewReader(c), v: v}
}

type accessIdentity = access.Identity

// connect opens a connection, sends CONNECT and gives the CONNACK.
func connect(t *testing.T, addr string, v byte, id string, change ...func(*packets.Packet)) (*raw, packets.Packet) {
	t.Helper()
	r := dialRaw(t, addr, v)
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect: packets.ConnectParams{
			ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: id, Keepalive: 60,
		},
	}
	for _, c := range change {
		c(&pk)
	}
	r.send(pk)
	return r, r.expect(packets.Connack)
}

func user(name string) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Connect.UsernameFlag, pk.Connect.Username = true, []byte(name)
	}
}

func will(t string, payload string, retain bool) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, t, []byte(payload)
		pk.Connect.WillQos, pk.Connect.WillRetain = 1, retain
	}
}

func encode(t testing.TB, v byte, pk packets.Packet) []byte {
	t.Helper()
	pk.ProtocolVersion = v
	pk.Mods.AllowResponseInfo = true
	var b bytes.Buffer
	var err error
	switch pk.FixedHeader.Type {
	case packets.Connect:
		err = pk.ConnectEncode(&b)
	case packets.Publish:
		err = pk.PublishEncode(&b)
	case packets.Puback:
		err = pk.PubackEncode(&b)
	case packets.Pubrel:
		pk.FixedHeader.Qos = 1
		err = pk.PubrelEncode(&b)
	case packets.Subscribe:
		pk.FixedHeader.Qos = 1
		err = pk.SubscribeEncode(&b)
	case packets.Unsubscribe:
		pk.FixedHeader.Qos = 1
		err = pk.UnsubscribeEncode(&b)
	case packets.Disconnect:
		err = pk.DisconnectEncode(&b)
	case packets.Pingreq:
		err = pk.PingreqEncode(&b)
	default:
		t.Fatalf("cannot encode packet type %d", pk.FixedHeader.Type)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (r *raw) send(pk packets.Packet) {
	r.t.Helper()
	r.write(encode(r.t, r.v, pk))
}

func (r *raw) write(b []byte) {
	r.t.Helper()
	_ = r.SetWriteDeadline(time.Now().Add(patience))
	if _, err := r.Write(b); err != nil {
		r.t.Fatal(err)
	}
}

// read gives the next packet or the connection's end.
func (r *raw) read() (packets.Packet, error) {
	_ = r.SetReadDeadline(time.Now().Add(patience))
	var pk packets.Packet
	b, err := r.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(b); err != nil {
		return pk, err
	}
	n, _, err := packets.DecodeLength(r.r)
	if err != nil {
		return pk, err
	}
	pk.FixedHeader.Remaining = n
	body := make([]byte, n)
	for read := 0; read < n; {
		m, err := r.r.Read(body[read:])
		if err != nil {
			return pk, err
		}
		read += m
	}
	pk.ProtocolVersion = r.v
	switch pk.FixedHeader.Type {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		err = pk.UnsubackDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	}
	return pk, err
}

func (r *raw) expect(kind byte) packets.Packet {
	r.t.Helper()
	pk, err := r.read()
	if err != nil {
		r.t.Fatalf("want a packet of type %d: %v", kind, err)
	}
	if pk.FixedHeader.Type != kind {
		r.t.Fatalf("want a packet of type %d, got type %d: %+v", kind, pk.FixedHeader.Type, pk)
	}
	return pk
}

// closed waits for the end of the connection, past packets under way, of which
// it gives a DISCONNECT.
func (r *raw) closed() (bye *packets.Packet) {
	r.t.Helper()
	for {
		pk, err := r.read()
		if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // net returns it bare
			r.t.Fatal("the connection stays open")
		}
		if err != nil {
			return bye
		}
		if pk.FixedHeader.Type == packets.Disconnect {
			bye = &pk
		}
	}
}

func publish(t string, payload string, qos byte, retain bool, id uint16) packets.Packet {
	return packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos, Retain: retain},
		TopicName:   t, Payload: []byte(payload), PacketID: id,
	}
}

func (r *raw) publish(t string, payload string, retain bool) packets.Packet {
	r.t.Helper()
	r.send(publish(t, payload, 1, retain, 7))
	return r.expect(packets.Puback)
}

func (r *raw) subscribe(subs ...packets.Subscription) packets.Packet {
	r.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: 9, Filters: subs}
	if subs[0].Identifier > 0 {
		pk.Properties.SubscriptionIdentifier = []int{subs[0].Identifier}
	}
	r.send(pk)
	for {
		pk, err := r.read()
		switch {
		case err != nil:
			r.t.Fatal(err)
		case pk.FixedHeader.Type == packets.Suback:
			return pk
		case pk.FixedHeader.Type != packets.Publish: // which the server may send first
			r.t.Fatalf("want SUBACK, got %+v", pk)
		}
		r.early = append(r.early, pk)
	}
}

// next is the next message, acknowledged.
func (r *raw) next() packets.Packet {
	r.t.Helper()
	var pk packets.Packet
	if len(r.early) > 0 {
		pk, r.early = r.early[0], r.early[1:]
	} else {
		pk = r.expect(packets.Publish)
	}
	if pk.FixedHeader.Qos > 0 {
		r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: pk.PacketID})
	}
	return pk
}

// nothing checks that no message is under way, by one of its own that comes first.
func (r *raw) nothing() {
	r.t.Helper()
	guard := fmt.Sprintf("guard/%p", r)
	if !r.guarded {
		r.guarded = true
		r.subscribe(packets.Subscription{Filter: guard})
	}
	r.send(publish(guard, "", 0, false, 0))
	if m := r.next(); m.TopicName != guard {
		r.t.Fatalf("want nothing, got %s %q", m.TopicName, m.Payload)
	}
}

func (r *raw) bye(code byte) {
	r.t.Helper()
	r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: code})
}

func hasAll(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

const pump = "plant-7"

var (
	reading = string(topic.ReportedTwin(pump, "default", "pump", "p"))
	set     = string(topic.Set(pump, "default", "pump", "p"))
)

func topicN(i int) topic.Topic { return topic.Topic("t/" + strconv.Itoa(i)) }
