package broker_test

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// TestModel does random things with a broker and with a small model of what
// MQTT sessions are, and compares what every client gets. Time is synctest's:
// after each step everybody is idle, and expiries are exact. A failure prints
// its seed and the fewest steps that still fail; run it again with
//
//	go test ./broker -run TestModel -args -seed N -rounds 1
func TestModel(t *testing.T) {
	first, rounds := seed(), 300
	if testing.Short() {
		rounds = 50
	}
	if *roundsFlag > 0 {
		rounds = *roundsFlag
	}
	t.Logf("seeds %d to %d", first, first+uint64(rounds)-1)
	for s := first; s < first+uint64(rounds); s++ {
		steps := modelSteps(s)
		err := runModel(t, s, steps)
		if err == nil {
			continue
		}
		steps = shrink(t, s, steps)
		err = cmp.Or(runModel(t, s, steps), err)
		var text []string
		for _, st := range steps {
			text = append(text, st.String())
		}
		t.Fatalf("seed %d: %v\nafter:\n%s", s, err, strings.Join(text, "\n"))
	}
}

// Steps that random rounds came by too seldom. The seed gives the clients'
// versions of MQTT.
func TestModelReplays(t *testing.T) {
	const seed = 1795395544677279062
	sub := func(filters ...string) step {
		return step{do: "subscribe", c: 4, filter: filters, opts: packets.Subscription{Qos: 1}}
	}
	pub := func(topic string, retain bool) step {
		return step{do: "publish", c: 1, topic: topic, qos: 1, flag: retain}
	}
	// A client with a full window and a message in its queue: its replays wait.
	held := []step{
		{do: "connect", c: 1, expiry: forever},
		pub("b", true),
		{do: "hold", c: 4},
		{do: "connect", c: 4, expiry: forever, n: 1},
		sub("b/c"),
		pub("b/c", false),
		pub("b/c", false),
	}
	for name, steps := range map[string][]step{
		"news":         {sub("#"), pub("a/c", true)},
		"news, cut":    {sub("#"), pub("a/c", true), {do: "cut", c: 4}},
		"restart":      {sub("#"), pub("a/c", true), {do: "restart"}}, // a/c comes as it was published, and as retained
		"two restarts": {sub("#"), pub("a/c", true), {do: "restart"}, {do: "restart"}},
		"overlapping":  {sub("+", "#"), {do: "unsubscribe", c: 4, filter: []string{"+"}}}, // # alone has its replay
	} {
		t.Run(name, func(t *testing.T) {
			if err := runModel(t, seed, slices.Concat(held, steps)); err != nil {
				t.Error(err)
			}
		})
	}
}

// shrink leaves steps out as long as the rest still fails.
func shrink(t *testing.T, s uint64, steps []step) []step {
	for size := len(steps) / 2; size > 0; {
		for i := 0; i+size <= len(steps); {
			less := slices.Delete(slices.Clone(steps), i, i+size)
			if runModel(t, s, less) != nil {
				steps = less
			} else {
				i += size
			}
		}
		if size /= 2; size > len(steps)/2 {
			size = max(len(steps)/2, 1)
		}
	}
	return steps
}

var (
	modelTopics  = []string{"a", "a/b", "a/c", "b", "b/c", "b/c/d"}
	modelFilters = []string{"a", "a/+", "a/#", "#", "+", "b/c", "b/+/d", "+/b", "b/#"}
)

const modelClients = 5

// step is one thing to do. A step that makes no sense when its turn comes, such
// as a publish of a client that is not connected, does nothing.
type step struct {
	do     string
	c      int
	topic  string
	filter []string
	qos    byte
	flag   bool // retain; clean start; a DISCONNECT of 0x04
	empty  bool
	n      int    // how many; receive maximum; a subscription id
	expiry uint32 // of the session or the message, in seconds
	opts   packets.Subscription
	will   *packets.ConnectParams
	sleep  time.Duration
}

func (s step) String() string {
	out := fmt.Sprintf("%s c%d", s.do, s.c)
	switch s.do {
	case "connect":
		out += fmt.Sprintf(" clean=%v expiry=%d receivemax=%d", s.flag, s.expiry, s.n)
		if s.will != nil {
			out += fmt.Sprintf(" will=%s qos=%d retain=%v delay=%d", s.will.WillTopic, s.will.WillQos, s.will.WillRetain, s.will.WillProperties.WillDelayInterval)
		}
	case "subscribe":
		out += fmt.Sprintf(" %v qos=%d nolocal=%v rap=%v rh=%d id=%d", s.filter, s.opts.Qos, s.opts.NoLocal, s.opts.RetainAsPublished, s.opts.RetainHandling, s.n)
	case "unsubscribe":
		out += fmt.Sprintf(" %v", s.filter)
	case "publish":
		out += fmt.Sprintf(" %s qos=%d retain=%v empty=%v expiry=%d", s.topic, s.qos, s.flag, s.empty, s.expiry)
	case "ack":
		out += fmt.Sprintf(" %d", s.n)
	case "disconnect":
		out += fmt.Sprintf(" will=%v expiry=%d", s.flag, s.expiry)
	case "sleep":
		out = "sleep " + s.sleep.String()
	case "restart":
		out = s.do
	}
	return out
}

func modelSteps(s uint64) []step {
	rng := rand.New(rand.NewPCG(s, 0))
	one := func(x []string) string { return x[rng.IntN(len(x))] }
	maybe := func(percent int) bool { return rng.IntN(100) < percent }
	var steps []step
	kinds := strings.Fields(`connect connect connect connect subscribe subscribe subscribe unsubscribe
		publish publish publish publish publish publish publish publish publish publish
		hold ack ack ack cut disconnect sleep restart pubrel resend`)
	for range 20 + rng.IntN(100) {
		st := step{do: one(kinds), c: rng.IntN(modelClients), topic: one(modelTopics), qos: byte(rng.IntN(3))}
		switch st.do {
		case "connect":
			st.flag, st.n = maybe(20), []int{0, 0, 1, 2, 3, 10}[rng.IntN(6)]
			st.expiry = []uint32{0, 3, 1000, 1000, forever, forever}[rng.IntN(6)]
			if maybe(30) {
				st.will = &packets.ConnectParams{
					WillFlag: true, WillTopic: one(modelTopics), WillQos: byte(rng.IntN(3)), WillRetain: maybe(50),
					WillProperties: packets.Properties{WillDelayInterval: []uint32{0, 0, 2, 10}[rng.IntN(4)]},
				}
			}
		case "subscribe":
			st.filter = []string{one(modelFilters)}
			if f := one(modelFilters); maybe(20) && f != st.filter[0] {
				st.filter = append(st.filter, f)
			}
			st.opts = packets.Subscription{Qos: st.qos, NoLocal: maybe(20), RetainAsPublished: maybe(30), RetainHandling: byte(rng.IntN(3))}
			if maybe(60) {
				st.n = 1 + rng.IntN(300)
			}
		case "unsubscribe":
			st.filter = []string{one(modelFilters)}
		case "publish":
			st.flag, st.empty = maybe(40), maybe(15)
			if maybe(20) {
				st.expiry = []uint32{2, 5, 100}[rng.IntN(3)]
			}
		case "ack":
			st.n = 1 + rng.IntN(4)
		case "disconnect":
			st.flag = maybe(30)
			if maybe(20) {
				st.expiry = 4
			}
		case "sleep":
			st.sleep = time.Duration(1+rng.IntN(6)) * 1130 * time.Millisecond
		case "restart":
			if maybe(50) {
				st.do = "cut"
			}
		}
		steps = append(steps, st)
	}
	return steps
}

// mMessage is an application message.
type mMessage struct {
	topic, payload string
	qos            byte
	retain         bool
	expires        time.Time // zero is never
	sent           time.Time
	from           int
}

// gone tells whether the message may be left out for its age: one of QoS 2 that
// was sent may not [MQTT-4.3.3-7].
func (o *mOwed) gone() bool { return o.m.expired() && (o.state == mQueued || o.qos < 2) }

func (m *mMessage) expired() bool { return !m.expires.IsZero() && !time.Now().Before(m.expires) }

// mOwed is a message that a session must deliver.
type mOwed struct {
	m        *mMessage
	qos      byte
	retain   bool
	either   bool // retain may have either value: overlapping subscriptions differ
	ids      []int
	filter   string // of a replay, which may come before what is in the queue
	optional bool   // may be left out
	state    mState
	conn     int // on which it was sent last
	id       uint16
}

type mState byte

const (
	mQueued   mState = iota
	mSent            // without an answer yet
	mReleased        // PUBREC was sent
)

type mSub struct {
	qos              byte
	noLocal, rap, v5 bool
	id               int
}

type mSession struct {
	subs    map[string]mSub
	replays map[string]*mReplay // that may not be out yet
	owed    []*mOwed            // QoS 1 and 2
	expiry  uint32
	ends    time.Time       // zero while connected, or for never
	recv    map[uint16]bool // our own QoS 2 publishes without PUBREL
}

// mReplay is of a subscription as it was made. had are the retained messages
// that are owed, or were.
type mReplay struct {
	sub mSub
	had map[string]*mMessage
}

type mWill struct {
	m   *mMessage
	due time.Time
}

type mClient struct {
	n    int
	v    byte
	w    *wire
	conn int // number of the connection
	max  int // receive maximum
	hold bool
	// its connection is being taken over: whether its own Will gets to it at QoS 0 is open
	taking bool
	// answers that a holding client has not sent yet
	held    []packets.Packet
	s       *mSession
	owed0   []*mOwed // QoS 0
	will    *packets.ConnectParams
	pending *mWill // waits for its delay
	lastID  uint16

	mu struct {
		sync.Mutex
		in  []packets.Packet
		err error
	}
}

type model struct {
	fs       vfs.FS
	b        *broker.Broker
	clients  []*mClient
	retained map[string]*mMessage
	sent     int
}

// runModel tells how the broker differs from the model.
func runModel(t *testing.T, s uint64, steps []step) (err error) {
	synctest.Test(t, func(*testing.T) {
		rng := rand.New(rand.NewPCG(s, 1))
		m := &model{fs: vfs.NewMem(), retained: map[string]*mMessage{}}
		for i := range modelClients {
			m.clients = append(m.clients, &mClient{n: i, v: []byte{5, 5, 5, 4}[rng.IntN(4)]})
		}
		if m.b, err = onMem(m.fs); err != nil {
			return
		}
		for i, st := range steps {
			if err = m.step(st); err != nil {
				err = fmt.Errorf("step %d, %s: %w", i, st, err)
				break
			}
		}
		if err == nil {
			err = m.finish()
		}
		for _, c := range m.clients {
			if c.w != nil {
				_ = c.w.Close()
			}
		}
		if cerr := m.b.Close(); err == nil {
			err = cerr
		}
	})
	return err
}

// finish lets every session come back and have all that it is owed.
func (m *model) finish() error {
	for _, c := range m.clients {
		c.hold = false
		if c.w == nil && c.s != nil {
			if err := m.step(step{do: "connect", c: c.n, expiry: forever}); err != nil {
				return fmt.Errorf("at the end: %w", err)
			}
		} else if c.w != nil {
			if err := m.step(step{do: "ack", c: c.n, n: 1 << 20}); err != nil {
				return fmt.Errorf("at the end: %w", err)
			}
		}
	}
	for _, c := range m.clients {
		for _, o := range c.owedNow() {
			if !o.optional && !o.gone() {
				return fmt.Errorf("at the end: c%d never got %s %q", c.n, o.m.topic, o.m.payload)
			}
		}
	}
	return nil
}

func (c *mClient) owedNow() []*mOwed {
	if c.s == nil {
		return nil
	}
	return c.s.owed
}

func (m *model) step(st step) error {
	c := m.clients[st.c]
	var err error
	switch st.do {
	case "connect":
		err = m.connect(c, st)
	case "subscribe":
		err = m.subscribe(c, st)
	case "unsubscribe":
		err = m.unsubscribe(c, st)
	case "publish":
		err = m.publish(c, st)
	case "resend":
		err = m.resend(c)
	case "pubrel":
		err = m.pubrel(c)
	case "hold":
		c.hold = !c.hold
	case "ack":
		for range st.n {
			if len(c.held) == 0 || c.w == nil {
				break
			}
			pk := c.held[0]
			c.held = c.held[1:]
			if err = m.answer(c, pk); err == nil {
				err = m.settle()
			}
			if err != nil {
				break
			}
		}
	case "cut":
		err = m.leave(c, nil, false)
	case "disconnect":
		err = m.disconnect(c, st)
	case "sleep":
		time.Sleep(st.sleep)
		m.elapse()
		for m.freshWill() {
			time.Sleep(1130 * time.Millisecond) // the broker may be a moment late
			m.elapse()
		}
	case "restart":
		err = m.restart()
	}
	if err != nil {
		return err
	}
	if err := m.settle(); err != nil {
		return err
	}
	for _, name := range modelTopics {
		want, ok := m.retained[name]
		ok = ok && !want.expired()
		p, has := m.b.Retained(topic.Topic(name))
		if has != ok || ok && string(p) != want.payload {
			return fmt.Errorf("retained %s: got %q, %v; want %v", name, p, has, want)
		}
	}
	return nil
}

// elapse does what time alone brings about.
func (m *model) elapse() {
	now := time.Now()
	for _, c := range m.clients {
		if c.w == nil && c.s != nil && !c.s.ends.IsZero() && now.After(c.s.ends) {
			c.s = nil
		}
	}
	for {
		var first *mClient
		for _, c := range m.clients {
			if c.pending != nil && now.After(c.pending.due) && (first == nil || c.pending.due.Before(first.pending.due)) {
				first = c
			}
		}
		if first == nil {
			return
		}
		w := first.pending
		first.pending = nil
		m.route(w.m)
	}
}

// freshWill tells whether a Will is due now, or was published so recently that
// the broker may not have come to it.
func (m *model) freshWill() bool {
	for _, c := range m.clients {
		if c.pending != nil && time.Until(c.pending.due) < 100*time.Millisecond {
			return true
		}
	}
	return false
}

// route hands a message to the sessions and keeps it if it is retained.
func (m *model) route(msg *mMessage) {
	if msg.retain {
		if msg.payload == "" {
			delete(m.retained, msg.topic)
		} else {
			m.retained[msg.topic] = msg
		}
	}
	for _, c := range m.clients {
		if c.s == nil {
			continue
		}
		for _, list := range [][]*mOwed{c.s.owed, c.owed0} {
			for _, r := range list {
				if r.filter != "" && r.state == mQueued && r.m.topic == msg.topic {
					r.optional = true // a newer one is on its way, or was this client's own
				}
			}
		}
		o := &mOwed{m: msg}
		matched, with, without := false, false, false
		for f, sub := range c.s.subs {
			if !matches(f, msg.topic) || sub.noLocal && msg.from == c.n {
				continue
			}
			matched = true
			o.qos = max(o.qos, min(sub.qos, msg.qos))
			if sub.id > 0 {
				o.ids = append(o.ids, sub.id)
			}
			with, without = with || sub.rap, without || !sub.rap
		}
		if !matched {
			continue
		}
		slices.Sort(o.ids)
		o.retain, o.either = msg.retain && with, msg.retain && with && without
		if o.qos > 0 {
			c.s.owed = append(c.s.owed, o)
		} else if c.w != nil || c.taking {
			o.optional = c.taking
			c.owed0 = append(c.owed0, o)
		}
	}
}

func (m *model) dial(c *mClient) error {
	nc, err := m.b.Pipe()
	if err != nil {
		return err
	}
	w := newWire(nc, c.v)
	c.w = w
	c.conn++
	c.mu.in, c.mu.err = nil, nil
	conn := c.conn
	go func() {
		for {
			pk, err := w.next()
			c.mu.Lock()
			stale := c.conn != conn
			if !stale && err != nil {
				c.mu.err = err
			} else if !stale {
				c.mu.in = append(c.mu.in, pk)
			}
			c.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return nil
}

// take gives the first packet of the type, past no other.
func (m *model) take(c *mClient, kind byte) (packets.Packet, error) {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, pk := range c.mu.in {
		if pk.FixedHeader.Type == kind {
			c.mu.in = slices.Delete(c.mu.in, i, i+1)
			return pk, nil
		}
	}
	return packets.Packet{}, fmt.Errorf("c%d: no packet of type %d; got %s, %w", c.n, kind, kinds(c.mu.in), cmp.Or(c.mu.err, errOpen))
}

var errOpen = errors.New("connection open")

func kinds(pks []packets.Packet) string {
	var out []string
	for _, pk := range pks {
		s := packets.PacketNames[pk.FixedHeader.Type]
		if pk.FixedHeader.Type == packets.Disconnect {
			s += fmt.Sprintf(" 0x%02x %s", pk.ReasonCode, pk.Properties.ReasonString)
		}
		out = append(out, s)
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func (m *model) connect(c *mClient, st step) error {
	if c.v < 5 && st.expiry != 0 {
		st.expiry = forever
	}
	if c.v < 5 {
		st.flag = st.expiry == 0 // without clean session, the session stays
	}
	m.elapse()
	if c.w != nil { // a takeover
		w := c.w
		c.taking = true
		err := m.left(c, false, st.flag)
		c.taking = false
		if err != nil {
			return err
		}
		defer func() { _ = w.Close() }()
	}
	if c.s != nil && st.flag {
		c.s = nil
		if c.pending != nil { // the session ends, and so does the delay
			m.route(c.pending.m)
		}
	}
	c.pending = nil
	present := c.s != nil
	if !present {
		c.owed0 = nil
		c.s = &mSession{subs: map[string]mSub{}, replays: map[string]*mReplay{}, recv: map[uint16]bool{}}
	}
	c.s.expiry, c.s.ends = st.expiry, time.Time{}
	c.held = nil
	c.max = 65535
	if st.n > 0 && c.v == 5 {
		c.max = st.n
	}
	c.will = nil
	if err := m.dial(c); err != nil {
		return err
	}
	// What the broker sends before CONNACK would be out of order.
	err := c.w.send(hello(c.v, fmt.Sprintf("c%d", c.n), st.flag, st.expiry, func(pk *packets.Packet) {
		if st.will != nil {
			w := *st.will
			m.sent++
			w.WillPayload = fmt.Appendf(nil, "will %d of c%d", m.sent, c.n)
			if c.v < 5 {
				w.WillProperties.WillDelayInterval = 0
			}
			c.will = &w
			pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload = true, w.WillTopic, w.WillPayload
			pk.Connect.WillQos, pk.Connect.WillRetain, pk.Connect.WillProperties = w.WillQos, w.WillRetain, w.WillProperties
		}
		if c.v == 5 {
			pk.Properties.ReceiveMaximum = uint16(st.n)
			pk.Properties.TopicAliasMaximum = uint16(st.n) * 2
		}
	}))
	if err != nil {
		return err
	}
	synctest.Wait()
	c.mu.Lock()
	head := len(c.mu.in) == 0 || c.mu.in[0].FixedHeader.Type == packets.Connack
	c.mu.Unlock()
	if !head {
		return errors.New("CONNACK is not the first packet")
	}
	ack, err := m.take(c, packets.Connack)
	if err != nil {
		return err
	}
	if ack.ReasonCode != 0 || ack.SessionPresent != present {
		return fmt.Errorf("CONNACK 0x%02x %s, session present %v; want %v", ack.ReasonCode, ack.Properties.ReasonString, ack.SessionPresent, present)
	}
	for id := range c.s.recv { // [MQTT-4.4.0-1]
		if err := c.w.send(note(packets.Pubrel, id)); err != nil {
			return err
		}
		if _, err := m.take(c, packets.Pubcomp); err != nil {
			return err
		}
		delete(c.s.recv, id)
	}
	return nil
}

// leave cuts the connection, or ends it with a DISCONNECT.
func (m *model) leave(c *mClient, bye *packets.Packet, quiet bool) error {
	if c.w == nil {
		return nil
	}
	if bye != nil {
		if err := c.w.send(*bye); err != nil {
			return err
		}
		synctest.Wait()
	}
	_ = c.w.Close()
	synctest.Wait()
	return m.left(c, quiet, false)
}

// left is what becomes of the session of a client whose connection has ended.
func (m *model) left(c *mClient, quiet, clean bool) error {
	c.mu.Lock()
	c.conn++
	c.mu.in, c.mu.err = nil, nil
	c.mu.Unlock()
	// The rest of a replay may still come to the session's next connection.
	c.owed0 = slices.DeleteFunc(c.owed0, func(o *mOwed) bool { o.optional = true; return o.filter == "" })
	c.w, c.held = nil, nil
	now := time.Now()
	defer time.Sleep(3 * time.Millisecond) // no two Wills are due at the same time
	s := c.s
	if s.expiry == 0 {
		c.s = nil
	} else if s.expiry != forever {
		s.ends = now.Add(time.Duration(s.expiry) * time.Second)
	}
	if c.will == nil || quiet {
		c.will = nil
		return nil
	}
	w := c.will
	c.will = nil
	delay := time.Duration(w.WillProperties.WillDelayInterval) * time.Second
	if s.expiry != forever {
		delay = min(delay, time.Duration(s.expiry)*time.Second)
	}
	msg := &mMessage{topic: w.WillTopic, payload: string(w.WillPayload), qos: w.WillQos, retain: w.WillRetain, from: c.n, sent: now}
	if delay == 0 || clean {
		m.route(msg)
	} else {
		c.pending = &mWill{m: msg, due: now.Add(delay)}
	}
	return nil
}

func (m *model) disconnect(c *mClient, st step) error {
	if c.w == nil {
		return nil
	}
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}
	if c.v == 5 {
		if st.flag {
			pk.ReasonCode = 4
		}
		if st.expiry > 0 && c.s.expiry > 0 { // [MQTT-3.14.2-2]
			pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = st.expiry, true
			c.s.expiry = st.expiry
		}
	}
	return m.leave(c, &pk, pk.ReasonCode == 0)
}

func (m *model) subscribe(c *mClient, st step) error {
	if c.w == nil {
		return nil
	}
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: c.id()}
	if c.v < 5 {
		st.opts, st.n = packets.Subscription{Qos: st.opts.Qos}, 0
	}
	for _, f := range st.filter {
		o := st.opts
		o.Filter = f
		pk.Filters = append(pk.Filters, o)
	}
	if st.n > 0 {
		pk.Properties.SubscriptionIdentifier = []int{st.n}
	}
	for _, f := range st.filter {
		_, had := c.s.subs[f]
		c.s.subs[f] = mSub{qos: st.opts.Qos, noLocal: st.opts.NoLocal, rap: st.opts.RetainAsPublished, id: st.n, v5: c.v == 5}
		if st.opts.RetainHandling == 2 || st.opts.RetainHandling == 1 && had {
			continue
		}
		for _, list := range [][]*mOwed{c.s.owed, c.owed0} {
			for _, o := range list {
				if o.filter == f && o.state == mQueued {
					o.optional = true // the new replay is in its place
				}
			}
		}
		c.s.replays[f] = &mReplay{sub: c.s.subs[f]}
		m.replay(c, f, false)
	}
	if err := c.w.send(pk); err != nil {
		return err
	}
	ack, err := m.take(c, packets.Suback)
	if err != nil {
		return err
	}
	if ack.PacketID != pk.PacketID || len(ack.ReasonCodes) != len(st.filter) {
		return fmt.Errorf("SUBACK %+v", ack)
	}
	for _, code := range ack.ReasonCodes {
		if code != st.opts.Qos {
			return fmt.Errorf("SUBACK with 0x%02x, want %d", code, st.opts.Qos)
		}
	}
	return nil
}

// replay owes a client the retained messages that are new to a replay.
func (m *model) replay(c *mClient, f string, optional bool) {
	p := c.s.replays[f]
	for name, r := range m.retained {
		if !matches(f, name) || r.expired() || p.had[name] == r {
			continue
		}
		o := &mOwed{m: r, qos: min(r.qos, p.sub.qos), retain: true, filter: f, optional: optional}
		if p.sub.id > 0 {
			o.ids = []int{p.sub.id}
		}
		if o.qos > 0 {
			c.s.owed = append(c.s.owed, o)
		} else {
			c.owed0 = append(c.owed0, o)
		}
	}
	p.had = maps.Clone(m.retained)
}

func (m *model) unsubscribe(c *mClient, st step) error {
	if c.w == nil {
		return nil
	}
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: c.id()}
	for _, f := range st.filter {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f})
	}
	if err := c.w.send(pk); err != nil {
		return err
	}
	ack, err := m.take(c, packets.Unsuback)
	if err != nil {
		return err
	}
	_, had := c.s.subs[st.filter[0]]
	if c.v == 5 && (len(ack.ReasonCodes) != 1 || (ack.ReasonCodes[0] == 0) != had) {
		return fmt.Errorf("UNSUBACK %v; subscribed: %v", ack.ReasonCodes, had)
	}
	delete(c.s.subs, st.filter[0])
	delete(c.s.replays, st.filter[0])
	for _, list := range [][]*mOwed{c.s.owed, c.owed0} {
		for _, o := range list {
			if o.state == mQueued && (o.filter == st.filter[0] || !c.wants(o.m)) {
				o.optional = true
			}
		}
	}
	return nil
}

func (c *mClient) wants(msg *mMessage) bool {
	for f, sub := range c.s.subs {
		if matches(f, msg.topic) && (!sub.noLocal || msg.from != c.n) {
			return true
		}
	}
	return false
}

// id is a packet id that the client does not use.
func (c *mClient) id() uint16 {
	for {
		c.lastID++
		if c.lastID != 0 && !c.s.recv[c.lastID] {
			return c.lastID
		}
	}
}

func (m *model) publish(c *mClient, st step) error {
	if c.w == nil {
		return nil
	}
	m.sent++
	msg := &mMessage{topic: st.topic, payload: fmt.Sprintf("%d of c%d", m.sent, c.n), qos: st.qos, retain: st.flag, from: c.n, sent: time.Now()}
	if st.empty {
		msg.payload = ""
	}
	pk := publish(msg.topic, msg.payload, msg.qos, msg.retain, 0)
	if st.expiry > 0 && c.v == 5 {
		msg.expires = msg.sent.Add(time.Duration(st.expiry) * time.Second)
		pk.Properties.MessageExpiryInterval = st.expiry
	}
	if msg.qos > 0 {
		pk.PacketID = c.id()
	}
	m.route(msg)
	if err := c.w.send(pk); err != nil {
		return err
	}
	if msg.qos == 0 {
		return nil
	}
	kind := packets.Puback
	if msg.qos == 2 {
		kind = packets.Pubrec
	}
	ack, err := m.take(c, kind)
	if err != nil {
		return err
	}
	if ack.PacketID != pk.PacketID || ack.ReasonCode >= 0x80 {
		return fmt.Errorf("answer %+v", ack)
	}
	if msg.qos < 2 {
		return nil
	}
	c.s.recv[pk.PacketID] = true
	if c.hold {
		return nil
	}
	return m.pubrel(c)
}

// pubrel releases the QoS 2 publishes that a holding client has kept.
func (m *model) pubrel(c *mClient) error {
	if c.w == nil {
		return nil
	}
	for id := range c.s.recv {
		if err := c.w.send(note(packets.Pubrel, id)); err != nil {
			return err
		}
		ack, err := m.take(c, packets.Pubcomp)
		if err != nil {
			return err
		}
		if ack.PacketID != id || ack.ReasonCode != 0 {
			return fmt.Errorf("PUBCOMP %d 0x%02x for %d", ack.PacketID, ack.ReasonCode, id)
		}
		delete(c.s.recv, id)
	}
	return nil
}

// resend publishes again, as a client does that has lost the PUBREC: nobody
// gets it a second time [MQTT-4.3.3-10].
func (m *model) resend(c *mClient) error {
	if c.w == nil || len(c.s.recv) == 0 {
		return nil
	}
	for id := range c.s.recv {
		pk := publish("a", "never to be seen", 2, false, id)
		pk.FixedHeader.Dup = true
		if err := c.w.send(pk); err != nil {
			return err
		}
		ack, err := m.take(c, packets.Pubrec)
		if err != nil {
			return err
		}
		if ack.PacketID != id || ack.ReasonCode >= 0x80 {
			return fmt.Errorf("PUBREC %+v", ack)
		}
	}
	return nil
}

// restart closes the broker in peace and opens it again.
func (m *model) restart() error {
	for _, c := range m.clients {
		if c.will != nil { // whose Will comes first at the end is not said
			if err := m.leave(c, nil, false); err != nil {
				return err
			}
			if err := m.settle(); err != nil {
				return err
			}
		}
	}
	// MQTT does not say whether the delay of a Will goes on while the server is
	// down: it is waited for.
	for _, c := range m.clients {
		if c.pending != nil {
			time.Sleep(max(time.Until(c.pending.due), 0) + 1130*time.Millisecond)
			m.elapse()
			if err := m.settle(); err != nil {
				return err
			}
		}
	}
	if err := m.b.Close(); err != nil {
		return err
	}
	for _, c := range m.clients {
		if c.w == nil {
			continue
		}
		_ = c.w.Close()
		if err := m.left(c, true, false); err != nil {
			return err
		}
	}
	// What was published since the SUBSCRIBE is not told from what was there
	// before: a replay that waits shows what the topics have by now.
	for _, c := range m.clients {
		if c.s != nil {
			for f := range c.s.replays {
				m.replay(c, f, true)
			}
		}
	}
	b, err := onMem(m.fs)
	if err != nil {
		return err
	}
	m.b = b
	// It is ready when somebody has come in.
	nc, err := b.Pipe()
	if err != nil {
		return err
	}
	synctest.Wait()
	return nc.Close()
}

// settle takes what came until nobody has anything to say any more, and then
// checks that nothing is missing.
func (m *model) settle() error {
	for _, c := range m.clients {
		spareLast(c.owedNow())
		spareLast(c.owed0)
	}
	for again := true; again; {
		again = false
		synctest.Wait()
		for _, c := range m.clients {
			c.mu.Lock()
			in, err := c.mu.in, c.mu.err
			c.mu.in = nil
			c.mu.Unlock()
			for _, pk := range in {
				again = true
				if err := m.receive(c, pk); err != nil {
					return fmt.Errorf("c%d: %w", c.n, err)
				}
			}
			if c.w != nil && err != nil && !again {
				return fmt.Errorf("c%d: the broker ended the connection: %w", c.n, err)
			}
		}
	}
	for _, c := range m.clients {
		if c.w == nil {
			continue
		}
		if err := c.missing(); err != nil {
			return fmt.Errorf("c%d: %w", c.n, err)
		}
	}
	return nil
}

// spareLast puts the replays that may be left out behind the others: where two
// overlapping ones are alike, what comes is the one that must.
func spareLast(list []*mOwed) {
	spare := func(o *mOwed) int {
		if o.optional && o.filter != "" && o.state == mQueued {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(list, func(a, b *mOwed) int { return spare(a) - spare(b) })
}

func (m *model) receive(c *mClient, pk packets.Packet) error {
	switch pk.FixedHeader.Type {
	case packets.Publish:
		if pk.FixedHeader.Qos == 0 {
			return m.got0(c, pk)
		}
		if err := c.got(pk); err != nil {
			return err
		}
		kind := packets.Puback
		if pk.FixedHeader.Qos == 2 {
			kind = packets.Pubrec
		}
		return m.reply(c, note(kind, pk.PacketID))
	case packets.Pubrel:
		for _, o := range c.s.owed {
			if o.state == mReleased && o.id == pk.PacketID {
				o.conn = c.conn
				return m.reply(c, note(packets.Pubcomp, pk.PacketID))
			}
		}
		return fmt.Errorf("PUBREL %d for nothing", pk.PacketID)
	default:
		return fmt.Errorf("unexpected %s", kinds([]packets.Packet{pk}))
	}
}

// reply answers at once, or keeps the answer.
func (m *model) reply(c *mClient, pk packets.Packet) error {
	if c.hold {
		c.held = append(c.held, pk)
		return nil
	}
	// In the order in which the messages came [MQTT-4.6.0-2].
	for len(c.held) > 0 {
		first := c.held[0]
		c.held = c.held[1:]
		if err := m.answer(c, first); err != nil {
			return err
		}
	}
	return m.answer(c, pk)
}

func (m *model) answer(c *mClient, pk packets.Packet) error {
	for i, o := range c.s.owed {
		if o.id != pk.PacketID || o.state == mQueued {
			continue
		}
		if pk.FixedHeader.Type == packets.Pubrec {
			o.state, o.conn = mReleased, -c.conn // PUBREL is to come
		} else {
			c.s.owed = slices.Delete(c.s.owed, i, i+1)
		}
		break
	}
	return c.w.send(pk)
}

// differs compares a PUBLISH with what is owed.
func (c *mClient) differs(o *mOwed, pk packets.Packet) error {
	retainOK := o.either || pk.FixedHeader.Retain == o.retain
	var want []int
	if c.v == 5 {
		want = o.ids
	}
	ids := slices.Clone(pk.Properties.SubscriptionIdentifier)
	slices.Sort(ids)
	if pk.TopicName != o.m.topic || string(pk.Payload) != o.m.payload || pk.FixedHeader.Qos != o.qos || !retainOK ||
		len(ids)+len(want) > 0 && !reflect.DeepEqual(ids, want) {
		return fmt.Errorf("got %s %q qos %d retain %v ids %v; want %s %q qos %d retain %v (either: %v) ids %v",
			pk.TopicName, pk.Payload, pk.FixedHeader.Qos, pk.FixedHeader.Retain, ids,
			o.m.topic, o.m.payload, o.qos, o.retain, o.either, want)
	}
	if o.m.expires.IsZero() {
		if pk.Properties.MessageExpiryInterval != 0 {
			return fmt.Errorf("%q expires in %d s", pk.Payload, pk.Properties.MessageExpiryInterval)
		}
		return nil
	}
	if c.v < 5 {
		return nil
	}
	left := max(time.Until(o.m.expires).Seconds(), 0)
	if got := float64(pk.Properties.MessageExpiryInterval); got < left-1.01 || got > left+1.01 { // [MQTT-3.3.2-6]
		return fmt.Errorf("%q expires in %v s, want about %v", pk.Payload, got, left)
	}
	if o.m.expired() && o.state == mQueued {
		return fmt.Errorf("%q has expired", pk.Payload)
	}
	return nil
}

func (m *model) got0(c *mClient, pk packets.Packet) error {
	var first error
	blocked := false
	for i, o := range c.owed0 {
		if blocked && o.filter == "" {
			continue
		}
		err := c.differs(o, pk)
		if err == nil {
			c.owed0 = slices.Delete(c.owed0, i, i+1)
			return nil
		}
		if first == nil {
			first = err
		}
		if o.filter == "" && !o.optional && !o.gone() {
			blocked = true // only replays may come earlier
		}
	}
	return cmp.Or(first, fmt.Errorf("got %s %q qos 0, want nothing", pk.TopicName, pk.Payload))
}

func (c *mClient) got(pk packets.Packet) error {
	var first error
	blocked := false
	for i, o := range c.s.owed {
		if blocked && (o.filter == "" || o.state == mSent && o.conn != c.conn) {
			continue
		}
		if o.state == mReleased || o.state == mSent && o.conn == c.conn {
			continue
		}
		// What was sent on an earlier connection comes first, as it was [MQTT-4.4.0-1].
		err := c.differs(o, pk)
		switch {
		case err != nil:
		case o.state == mSent && (!pk.FixedHeader.Dup || pk.PacketID != o.id):
			err = fmt.Errorf("%q again: dup %v, packet id %d, was %d", pk.Payload, pk.FixedHeader.Dup, pk.PacketID, o.id)
		case o.state == mQueued && pk.FixedHeader.Dup:
			err = fmt.Errorf("%q for the first time, with dup", pk.Payload)
		default:
			for _, other := range c.s.owed {
				if other != o && other.state != mQueued && other.id == pk.PacketID {
					return fmt.Errorf("packet id %d of %q is in use for %q", pk.PacketID, pk.Payload, other.m.payload)
				}
			}
			o.state, o.conn, o.id = mSent, c.conn, pk.PacketID
			if n := c.window(); n > c.max {
				return fmt.Errorf("%d messages in flight, the client's Receive Maximum is %d", n, c.max)
			}
			// It keeps the order of the first time.
			sentBefore := 0
			for sentBefore < i && c.s.owed[sentBefore].state != mQueued {
				sentBefore++
			}
			c.s.owed = slices.Insert(slices.Delete(c.s.owed, i, i+1), sentBefore, o)
			return nil
		}
		if first == nil {
			first = err
		}
		if !o.optional && !o.gone() {
			if o.state == mSent {
				break // again before anything new
			}
			blocked = blocked || o.filter == "" // only replays may come earlier
		}
	}
	return cmp.Or(first, fmt.Errorf("got %s %q qos %d, want nothing", pk.TopicName, pk.Payload, pk.FixedHeader.Qos))
}

// window is how many messages are in flight on this connection.
func (c *mClient) window() (n int) {
	for _, o := range c.s.owed {
		if o.conn == c.conn && o.state == mSent || (o.conn == -c.conn || o.conn == c.conn) && o.state == mReleased {
			n++
		}
	}
	return n
}

// missing tells of what should be here by now.
func (c *mClient) missing() error {
	room := c.max
	for _, o := range c.s.owed {
		if o.state == mReleased && o.conn != c.conn {
			return fmt.Errorf("PUBREL %d for %q never came", o.id, o.m.payload)
		}
		if o.state != mQueued {
			room--
		}
	}
	if room <= 0 {
		return nil
	}
	clear(c.s.replays)
	for _, list := range [][]*mOwed{c.s.owed, c.owed0} {
		for _, o := range list {
			if !o.optional && !o.gone() && (o.state == mQueued || o.state == mSent && o.conn != c.conn) {
				return fmt.Errorf("%s %q qos %d retain %v (replay of %q) never came", o.m.topic, o.m.payload, o.qos, o.retain, o.filter)
			}
		}
	}
	return nil
}
