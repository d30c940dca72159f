package broker_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/storage"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// peer is a client of one goroutine that speaks both versions and every QoS, and
// does nothing by itself. What a broker sends while something else is waited for
// is kept in the order of arrival.
type peer struct {
	t      testing.TB
	c      net.Conn
	r      *bufio.Reader
	v      byte
	wait   time.Duration    // how long what must come may take
	soft   bool             // what does not come is the broker's fault, not the test's: panic(fault)
	held   []packets.Packet // PUBLISH and PUBREL that came before what was asked for
	lastID uint16
	guard  string
	// lastRel is the packet id of the PUBREL that want gave last.
	lastRel uint16
}

// fault is what a soft peer found wrong.
type fault struct{ error }

func (p *peer) fail(format string, args ...any) {
	p.t.Helper()
	if p.soft {
		panic(fault{fmt.Errorf(format, args...)})
	}
	p.t.Fatalf(format, args...)
}

// newPeer speaks version v, 3, 4 or 5, over a connection.
func newPeer(t testing.TB, c net.Conn, v byte) *peer {
	t.Cleanup(func() { _ = c.Close() })
	return &peer{t: t, c: c, r: bufio.NewReader(c), v: v, wait: patience}
}

func dialPeer(t testing.TB, addr string, v byte) *peer {
	t.Helper()
	d, err := client.ParseURL(addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, c, v)
}

// join connects a client and wants it to be let in.
func join(t testing.TB, addr string, v byte, id string, change ...func(*packets.Packet)) *peer {
	t.Helper()
	p := dialPeer(t, addr, v)
	if ack := p.connect(id, change...); ack.ReasonCode != 0 {
		t.Fatalf("CONNACK 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	return p
}

func connectPacket(id string, change ...func(*packets.Packet)) packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect:     packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: id},
	}
	for _, c := range change {
		c(&pk)
	}
	return pk
}

func (p *peer) connect(id string, change ...func(*packets.Packet)) packets.Packet {
	p.t.Helper()
	p.send(connectPacket(id, change...))
	return p.want(packets.Connack)
}

// resume asks for the session of before, and for one that outlives the
// connection: for an hour in MQTT 5, for ever in MQTT 3.1.1.
func resume(pk *packets.Packet) { lasting(3600)(pk) }

// lasting is resume with a Session Expiry Interval in seconds.
func lasting(seconds uint32) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Connect.Clean = false
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = seconds, true
	}
}

// fresh is lasting without a session of before.
func fresh(seconds uint32) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		lasting(seconds)(pk)
		pk.Connect.Clean = true
	}
}

func receiveMax(n uint16) func(*packets.Packet) {
	return func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = n }
}

// delayedWill is a Will, in MQTT 5 with a Will Delay Interval in seconds.
func delayedWill(topic, payload string, seconds uint32) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		will(topic, payload, false)(pk)
		pk.Connect.WillProperties.WillDelayInterval = seconds
	}
}

func (p *peer) encode(pk packets.Packet) []byte {
	p.t.Helper()
	var b bytes.Buffer
	pk.ProtocolVersion = p.v
	switch pk.FixedHeader.Type {
	case packets.Pubrec:
		if err := pk.PubrecEncode(&b); err != nil {
			p.t.Fatal(err)
		}
	case packets.Pubcomp:
		if err := pk.PubcompEncode(&b); err != nil {
			p.t.Fatal(err)
		}
	default:
		return encode(p.t, p.v, pk)
	}
	return b.Bytes()
}

func (p *peer) send(pk packets.Packet) {
	p.t.Helper()
	p.write(p.encode(pk))
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	_ = p.c.SetWriteDeadline(time.Now().Add(p.wait))
	if _, err := p.c.Write(b); err != nil {
		p.fail("write: %v", err)
	}
}

// read gives the next packet or the connection's end.
func (p *peer) read() (pk packets.Packet, err error) {
	_ = p.c.SetReadDeadline(time.Now().Add(p.wait))
	b, err := p.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(b); err != nil {
		return pk, err
	}
	if pk.FixedHeader.Remaining, _, err = packets.DecodeLength(p.r); err != nil {
		return pk, err
	}
	body := make([]byte, pk.FixedHeader.Remaining)
	if _, err := io.ReadFull(p.r, body); err != nil {
		return pk, err
	}
	pk.ProtocolVersion = p.v
	switch pk.FixedHeader.Type {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
	case packets.Puback, packets.Pubrec, packets.Pubrel, packets.Pubcomp:
		err = pk.PubackDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		err = pk.UnsubackDecode(body)
	case packets.Disconnect:
		err = pk.DisconnectDecode(body)
	case packets.Pingresp:
	default:
		err = fmt.Errorf("a server sends no packet of type %d", pk.FixedHeader.Type)
	}
	return pk, err
}

// want gives the next packet of a type. Messages that come first are kept.
func (p *peer) want(kind byte) packets.Packet {
	p.t.Helper()
	for i, pk := range p.held {
		if pk.FixedHeader.Type == kind {
			p.held = append(p.held[:i:i], p.held[i+1:]...)
			return p.note(pk)
		}
	}
	for {
		pk, err := p.read()
		switch {
		case err != nil:
			p.fail("want %s: %v", packets.PacketNames[kind], err)
		case pk.FixedHeader.Type == kind:
			return p.note(pk)
		case pk.FixedHeader.Type == packets.Publish || pk.FixedHeader.Type == packets.Pubrel:
			p.held = append(p.held, pk)
		default:
			p.fail("want %s, got %s 0x%02x %q", packets.PacketNames[kind], packets.PacketNames[pk.FixedHeader.Type], pk.ReasonCode, pk.Properties.ReasonString)
		}
	}
}

func (p *peer) note(pk packets.Packet) packets.Packet {
	if pk.FixedHeader.Type == packets.Pubrel {
		p.lastRel = pk.PacketID
	}
	return pk
}

func (p *peer) id() uint16 {
	p.lastID++
	return p.lastID
}

func ackOf(kind byte, id uint16) packets.Packet {
	return packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
}

// message is the next message, not acknowledged.
func (p *peer) message() packets.Packet {
	p.t.Helper()
	return p.want(packets.Publish)
}

// accept acknowledges a message to the end.
func (p *peer) accept(m packets.Packet) {
	p.t.Helper()
	switch m.FixedHeader.Qos {
	case 1:
		p.send(ackOf(packets.Puback, m.PacketID))
	case 2:
		p.send(ackOf(packets.Pubrec, m.PacketID))
		if rel := p.want(packets.Pubrel); rel.PacketID != m.PacketID || rel.ReasonCode != 0 {
			p.fail("PUBREL %d 0x%02x for message %d", rel.PacketID, rel.ReasonCode, m.PacketID)
		}
		p.send(ackOf(packets.Pubcomp, m.PacketID))
	}
}

// next is the next message, acknowledged.
func (p *peer) next() packets.Packet {
	p.t.Helper()
	m := p.message()
	p.accept(m)
	return m
}

// nextIs wants the next message to have the payload.
func (p *peer) nextIs(payload string) packets.Packet {
	p.t.Helper()
	m := p.next()
	if string(m.Payload) != payload {
		p.fail("got %s %q, want %q", m.TopicName, m.Payload, payload)
	}
	return m
}

// silent wants no message to be under way, by one of the peer's own that comes first.
func (p *peer) silent() {
	p.t.Helper()
	if p.guard == "" {
		p.guard = fmt.Sprintf("$guard/%p", p) // no wildcard selects it
		p.sub(p.guard, 0)
	}
	p.send(publish(p.guard, "", 0, false, 0))
	if m := p.next(); m.TopicName != p.guard {
		p.fail("want nothing, got %s %q", m.TopicName, m.Payload)
	}
}

// ping waits for the broker to have read all that was sent.
func (p *peer) ping() {
	p.t.Helper()
	p.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	p.want(packets.Pingresp)
}

// pub publishes, sees the handshake through and gives the answer's reason code.
func (p *peer) pub(topic, payload string, qos byte, change ...func(*packets.Packet)) byte {
	p.t.Helper()
	pk := publish(topic, payload, qos, false, 0)
	if qos > 0 {
		pk.PacketID = p.id()
	}
	for _, c := range change {
		c(&pk)
	}
	p.send(pk)
	return p.answered(pk).ReasonCode
}

// answered waits until a publish is acknowledged and gives PUBACK or PUBREC.
func (p *peer) answered(pk packets.Packet) (ack packets.Packet) {
	p.t.Helper()
	switch pk.FixedHeader.Qos {
	case 1:
		ack = p.want(packets.Puback)
	case 2:
		if ack = p.want(packets.Pubrec); ack.ReasonCode < 0x80 {
			p.send(ackOf(packets.Pubrel, pk.PacketID))
			if c := p.want(packets.Pubcomp); c.PacketID != pk.PacketID || c.ReasonCode != 0 {
				p.fail("PUBCOMP %d 0x%02x for %d", c.PacketID, c.ReasonCode, pk.PacketID)
			}
		}
	default:
		return ack
	}
	if ack.PacketID != pk.PacketID {
		p.fail("the answer is for %d, want %d", ack.PacketID, pk.PacketID)
	}
	return ack
}

// retained publishes with the retain flag.
func retained(pk *packets.Packet) { pk.FixedHeader.Retain = true }

func (p *peer) subs(subs ...packets.Subscription) packets.Packet {
	p.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: p.id(), Filters: subs}
	if subs[0].Identifier > 0 {
		pk.Properties.SubscriptionIdentifier = []int{subs[0].Identifier}
	}
	p.send(pk)
	ack := p.want(packets.Suback)
	if ack.PacketID != pk.PacketID || len(ack.ReasonCodes) != len(subs) {
		p.fail("SUBACK %d %v for %d with %d filters", ack.PacketID, ack.ReasonCodes, pk.PacketID, len(subs))
	}
	return ack
}

// sub subscribes and wants the QoS to be granted.
func (p *peer) sub(filter string, qos byte) {
	p.t.Helper()
	if ack := p.subs(packets.Subscription{Filter: filter, Qos: qos}); ack.ReasonCodes[0] != qos {
		p.fail("SUBACK 0x%02x for %s", ack.ReasonCodes[0], filter)
	}
}

func (p *peer) unsub(filters ...string) packets.Packet {
	p.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: p.id()}
	for _, f := range filters {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f})
	}
	p.send(pk)
	ack := p.want(packets.Unsuback)
	if ack.PacketID != pk.PacketID {
		p.fail("UNSUBACK for %d, want %d", ack.PacketID, pk.PacketID)
	}
	return ack
}

// gone waits for the end of the connection and gives a DISCONNECT before it.
func (p *peer) gone() (bye *packets.Packet) {
	p.t.Helper()
	for {
		pk, err := p.read()
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			p.fail("the connection stays open")
		}
		if err != nil {
			return bye
		}
		if pk.FixedHeader.Type == packets.Disconnect {
			bye = &pk
		}
	}
}

// refused wants a DISCONNECT with the reason code in MQTT 5, and the
// connection's end in either version.
func (p *peer) refused(code byte) {
	p.t.Helper()
	bye := p.gone()
	switch {
	case p.v < 5 && bye != nil:
		p.fail("MQTT 3.1.1 got a DISCONNECT 0x%02x", bye.ReasonCode)
	case p.v == 5 && bye == nil:
		p.fail("the connection ends without DISCONNECT, want 0x%02x", code)
	case p.v == 5 && bye.ReasonCode != code:
		p.fail("DISCONNECT 0x%02x %q, want 0x%02x", bye.ReasonCode, bye.Properties.ReasonString, code)
	}
}

// bye disconnects and waits until the broker is done with it.
func (p *peer) bye(code byte, change ...func(*packets.Packet)) {
	p.t.Helper()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: code}
	for _, c := range change {
		c(&pk)
	}
	p.send(pk)
	p.gone()
}

// drop ends the connection without a word.
func (p *peer) drop() { _ = p.c.Close() }

// everybody is let in, as a local client.
func everybody(broker.ConnectInfo) (access.Identity, error) {
	return access.Identity{Role: access.Local}, nil
}

// pumped is a pipe that takes what is written to it at once, as a socket does.
type pumped struct {
	net.Conn
	wake chan struct{} // capacity 1
	mu   struct {
		sync.Mutex
		in       bytes.Buffer
		err      error
		deadline time.Time
	}
}

func newPumped(c net.Conn) *pumped {
	p := &pumped{Conn: c, wake: make(chan struct{}, 1)}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := c.Read(b)
			p.mu.Lock()
			p.mu.in.Write(b[:n])
			p.mu.err = err
			p.mu.Unlock()
			select {
			case p.wake <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return p
}

// SetReadDeadline implements net.Conn for the next Read.
func (p *pumped) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.deadline = t
	return nil
}

// Read implements net.Conn.
func (p *pumped) Read(b []byte) (int, error) {
	p.mu.Lock()
	late := time.NewTimer(time.Until(p.mu.deadline))
	p.mu.Unlock()
	defer late.Stop()
	for {
		p.mu.Lock()
		n, _ := p.mu.in.Read(b)
		err := p.mu.err
		p.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		select {
		case <-p.wake:
		case <-late.C:
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// pipe is a connection to the broker inside this process.
func pipe(t testing.TB, b *broker.Broker) net.Conn {
	t.Helper()
	c, err := b.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	return newPumped(c)
}

// disk stands between a broker and its store: a test makes it slow, holds it or
// lets it fail. A sync takes delay.
type disk struct {
	delay time.Duration
	mu    struct {
		sync.Mutex
		held, failing bool
		waiting       chan struct{} // closed when somebody waits
		released      chan struct{}
	}
}

func newDisk(delay time.Duration) *disk {
	d := &disk{delay: delay}
	d.mu.waiting, d.mu.released = make(chan struct{}), make(chan struct{})
	return d
}

// write is called before every write.
func (d *disk) write() error {
	d.mu.Lock()
	held, failing := d.mu.held, d.mu.failing
	if held {
		select {
		case <-d.mu.waiting:
		default:
			close(d.mu.waiting)
		}
	}
	d.mu.Unlock()
	if failing {
		return errors.New("the disk fails")
	}
	if held {
		<-d.mu.released
	}
	return nil
}

// command does what a test wants. await returns once a write is held.
func (d *disk) command(cmd string) error {
	if cmd == "await" {
		select {
		case <-d.mu.waiting:
			return nil
		case <-time.After(patience):
			return errors.New("disk: nobody writes")
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch cmd {
	case "hold":
		d.mu.held = true
	case "release":
		d.mu.held = false
		close(d.mu.released)
	case "fail":
		d.mu.failing = true
	default:
		return fmt.Errorf("disk: %q?", cmd)
	}
	return nil
}

// fs is the operating system's files on this disk.
func (d *disk) fs() vfs.FS {
	return errorfs.Wrap(vfs.Default, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
			return nil
		}
		if op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData {
			time.Sleep(d.delay)
		}
		return d.write()
	}))
}

// setup is what a case asks of both brokers.
type setup struct {
	Stock    bool          // stock mochi
	Dir      string        // where it keeps its state; stock mochi keeps none where it is empty
	Disk     bool          // commands for the disk are accepted
	Sync     time.Duration // how long a sync takes
	Deadline time.Duration // before CONNECT, where there is one
	Allow    []string      // prefixes of the topics that may be published; empty for all
	Child    bool          // in a process of its own, so that it can be killed
}

// served is a broker under test.
type served struct {
	addr, ws string
	disk     func(cmd string) error
	kill     func() // with -9, where it has a process of its own
	stop     func()
}

// serve starts either broker in this process.
func (s setup) serve(log *slog.Logger) (*served, error) {
	d := newDisk(s.Sync)
	if s.Stock {
		return s.serveStock(d)
	}
	o := broker.Options{
		Dir: s.Dir, Node: pump, Logger: log, ConnectDeadline: s.Deadline,
		Authenticate: everybody,
	}
	if s.Disk || s.Sync > 0 {
		o.Store.FS = d.fs()
	}
	b, err := broker.Open(o)
	if err != nil {
		return nil, err
	}
	v := &served{disk: d.command, stop: func() { _ = b.Close() }}
	if v.addr, err = b.Listen("127.0.0.1:0"); err == nil {
		v.ws, err = b.Listen("ws://127.0.0.1:0/mqtt")
	}
	return v, err
}

// serveStock starts mochi as it is shipped.
func (s setup) serveStock(d *disk) (*served, error) {
	srv := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	h := &stockHook{disk: d, allow: s.Allow}
	if s.Dir != "" {
		if err := h.open(s.Dir); err != nil {
			return nil, err
		}
	}
	if err := srv.AddHook(h, nil); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0") // its WebSocket listener does not tell its port,
	if err != nil {
		return nil, err
	}
	ws := free.Addr().String()
	_ = free.Close()
	err = errors.Join(
		srv.AddListener(listeners.NewNet("tcp", l)),
		srv.AddListener(listeners.NewWebsocket(listeners.Config{ID: "ws", Address: ws})),
		srv.Serve())
	for deadline := time.Now().Add(patience); err == nil; time.Sleep(time.Millisecond) { // nor when it listens
		c, e := net.Dial("tcp", ws)
		if e == nil {
			_ = c.Close()
			break
		}
		if time.Now().After(deadline) {
			err = e
		}
	}
	return &served{addr: "mqtt://" + l.Addr().String(), ws: "ws://" + ws + "/mqtt", disk: d.command, stop: func() { _ = srv.Close() }}, err
}

// stockHook gives stock mochi what it needs to be compared fairly: everybody is
// let in, and a store that syncs every change before the hook returns. mochi's
// own hooks do less: they do not sync, and need modules that we do not have.
type stockHook struct {
	mqtt.HookBase
	disk  *disk
	allow []string

	mu   sync.Mutex
	file *os.File
	kept stockState
}

// stockState is what is in the store.
type stockState struct {
	clients  map[string]storage.Client
	subs     map[string]storage.Subscription
	inflight map[string]storage.Message
	retained map[string]storage.Message
}

// stockRecord is one change of it; nil deletes.
type stockRecord struct {
	Kind, Key string
	Client    *storage.Client
	Sub       *storage.Subscription
	Message   *storage.Message
}

func (k *stockState) apply(r *stockRecord) {
	switch r.Kind {
	case "client":
		put(k.clients, r.Key, r.Client)
	case "sub":
		put(k.subs, r.Key, r.Sub)
	case "inflight":
		put(k.inflight, r.Key, r.Message)
	case "retained":
		put(k.retained, r.Key, r.Message)
	}
}

func put[V any](m map[string]V, key string, v *V) {
	if v == nil {
		delete(m, key)
	} else {
		m[key] = *v
	}
}

func values[V any](m map[string]V) (vs []V) {
	for _, v := range m {
		vs = append(vs, v)
	}
	return vs
}

func (h *stockHook) open(dir string) error {
	h.kept = stockState{map[string]storage.Client{}, map[string]storage.Subscription{}, map[string]storage.Message{}, map[string]storage.Message{}}
	f, err := os.OpenFile(filepath.Join(dir, "stock"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	for dec := json.NewDecoder(f); ; {
		var r stockRecord
		if err := dec.Decode(&r); err != nil {
			break // the end, or a record that was being written
		}
		h.kept.apply(&r)
	}
	h.file = f
	return nil
}

func (h *stockHook) put(r stockRecord) {
	if h.disk.write() != nil || h.file == nil {
		return // no hook but OnPublish can tell
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	time.Sleep(h.disk.delay)
	line, err := json.Marshal(r)
	if err == nil {
		_, err = h.file.Write(append(line, '\n'))
	}
	if err := errors.Join(err, h.file.Sync()); err != nil {
		panic(err)
	}
	h.kept.apply(&r)
}

func (h *stockHook) ID() string { return "stock" }

func (h *stockHook) Provides(b byte) bool {
	switch b {
	case mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnPublish:
		return true
	case mqtt.OnSessionEstablished, mqtt.OnDisconnect, mqtt.OnSubscribed, mqtt.OnUnsubscribed, mqtt.OnRetainMessage,
		mqtt.OnQosPublish, mqtt.OnQosComplete, mqtt.OnQosDropped,
		mqtt.StoredClients, mqtt.StoredSubscriptions, mqtt.StoredInflightMessages, mqtt.StoredRetainedMessages:
		return h.file != nil
	}
	return false
}

func (h *stockHook) OnConnectAuthenticate(*mqtt.Client, packets.Packet) bool { return true }

func (h *stockHook) OnACLCheck(_ *mqtt.Client, topic string, write bool) bool {
	for _, p := range h.allow {
		if strings.HasPrefix(topic, p) {
			return true
		}
	}
	return len(h.allow) == 0 || !write
}

// OnPublish is the only hook that can refuse: it reports what the disk reports.
func (h *stockHook) OnPublish(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	if h.disk.mu.failing {
		return pk, errors.New("the disk fails")
	}
	return pk, nil
}

func (h *stockHook) StoredClients() ([]storage.Client, error) { return values(h.kept.clients), nil }
func (h *stockHook) StoredSubscriptions() ([]storage.Subscription, error) {
	return values(h.kept.subs), nil
}
func (h *stockHook) StoredInflightMessages() ([]storage.Message, error) {
	return values(h.kept.inflight), nil
}
func (h *stockHook) StoredRetainedMessages() ([]storage.Message, error) {
	return values(h.kept.retained), nil
}

func (h *stockHook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	h.put(stockRecord{Kind: "client", Key: cl.ID, Client: &storage.Client{
		ID: cl.ID, Listener: cl.Net.Listener, Clean: cl.Properties.Clean, ProtocolVersion: cl.Properties.ProtocolVersion,
		Properties: storage.ClientProperties{
			SessionExpiryInterval:     cl.Properties.Props.SessionExpiryInterval,
			SessionExpiryIntervalFlag: cl.Properties.Props.SessionExpiryIntervalFlag,
		},
	}})
}

func (h *stockHook) OnDisconnect(cl *mqtt.Client, _ error, expire bool) {
	if expire {
		h.put(stockRecord{Kind: "client", Key: cl.ID})
	}
}

func (h *stockHook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, codes []byte) {
	for i, s := range pk.Filters {
		h.put(stockRecord{Kind: "sub", Key: cl.ID + "\x00" + s.Filter, Sub: &storage.Subscription{Client: cl.ID, Filter: s.Filter, Qos: codes[i]}})
	}
}

func (h *stockHook) OnUnsubscribed(cl *mqtt.Client, pk packets.Packet) {
	for _, s := range pk.Filters {
		h.put(stockRecord{Kind: "sub", Key: cl.ID + "\x00" + s.Filter})
	}
}

func (h *stockHook) OnRetainMessage(_ *mqtt.Client, pk packets.Packet, n int64) {
	r := stockRecord{Kind: "retained", Key: pk.TopicName}
	if n >= 0 {
		r.Message = stockMessage("", pk)
	}
	h.put(r)
}

func (h *stockHook) OnQosPublish(cl *mqtt.Client, pk packets.Packet, _ int64, _ int) {
	if pk.FixedHeader.Type == packets.Publish {
		h.put(stockRecord{Kind: "inflight", Key: cl.ID + "\x00" + pk.FormatID(), Message: stockMessage(cl.ID, pk)})
	}
}

func (h *stockHook) OnQosComplete(cl *mqtt.Client, pk packets.Packet) {
	h.put(stockRecord{Kind: "inflight", Key: cl.ID + "\x00" + pk.FormatID()})
}

func (h *stockHook) OnQosDropped(cl *mqtt.Client, pk packets.Packet) { h.OnQosComplete(cl, pk) }

func stockMessage(client string, pk packets.Packet) *storage.Message {
	return &storage.Message{
		FixedHeader: pk.FixedHeader, Client: client, Origin: pk.Origin, TopicName: pk.TopicName,
		Payload: pk.Payload, Created: pk.Created, PacketID: pk.PacketID,
	}
}

// serveEnv holds the setup of a child of start.
const serveEnv = "FAIRLEAD_TEST_SERVE"

// TestServe is the child: it serves until it is killed or its standard input ends.
func TestServe(t *testing.T) {
	var s setup
	if env := os.Getenv(serveEnv); env == "" {
		t.Skip("for the children of other tests")
	} else if err := json.Unmarshal([]byte(env), &s); err != nil {
		t.Fatal(err)
	}
	v, err := s.serve(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("SERVED", v.addr, v.ws)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		go func() { fmt.Println("SERVED", v.disk(in.Text())) }()
	}
	os.Exit(0) // a store that failed cannot be closed
}

// start starts a broker; it ends with the test.
func (s setup) start(t *testing.T) *served {
	t.Helper()
	if !s.Child {
		v, err := s.serve(slog.New(slog.NewTextHandler(t.Output(), nil)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.stop)
		return v
	}
	env, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestServe$") //nolint:noctx // it is killed below, after the test's clients
	cmd.Env = append(os.Environ(), child+"=1", serveEnv+"="+string(env))
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill := func() { once.Do(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }) }
	t.Cleanup(kill)
	lines := bufio.NewScanner(out)
	answer := func() string {
		for lines.Scan() {
			if a, ok := strings.CutPrefix(lines.Text(), "SERVED "); ok {
				return a
			}
			t.Log("child:", lines.Text())
		}
		t.Fatal("the child ended")
		return ""
	}
	v := &served{kill: kill, stop: kill}
	if _, err := fmt.Sscan(answer(), &v.addr, &v.ws); err != nil {
		t.Fatal(err)
	}
	v.disk = func(cmd string) error {
		if _, err := fmt.Fprintln(in, cmd); err != nil {
			return err
		}
		if a := answer(); a != "<nil>" {
			return errors.New(a)
		}
		return nil
	}
	return v
}
