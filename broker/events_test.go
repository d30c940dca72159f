package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const alarm = "fl/plant-7/event/alarm/pump"

// logged turns the event log on.
func logged(bytes int64, age time.Duration) func(*broker.Options) {
	return func(o *broker.Options) { o.EventBytes, o.EventAge = bytes, age }
}

// events reads the whole log.
func events(t *testing.T, b *broker.Broker) []store.Event {
	t.Helper()
	var out []store.Event
	for {
		from := uint64(0)
		if len(out) > 0 {
			from = out[len(out)-1].Seq + 1
		}
		page, err := b.Events(from, 100)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			return out
		}
		out = append(out, page...)
	}
}

// show writes a log in short: number and payload, or from and to of a gap.
func show(log []store.Event) string {
	var out []string
	for _, e := range log {
		if e.Gap != nil {
			out = append(out, fmt.Sprintf("gap %d-%d", e.Gap.From, e.Seq))
			continue
		}
		out = append(out, fmt.Sprintf("%d %s", e.Seq, e.Payload))
	}
	return strings.Join(out, ", ")
}

// taken says that the cloud has the event, and waits until the log knows.
func taken(t *testing.T, b *broker.Broker, e store.Event) {
	t.Helper()
	if err := b.EventsTaken(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the answer to the first may be in the same batch
		if err := b.Do(t.Context(), func() []broker.Message { return nil }); err != nil {
			t.Fatal(err)
		}
	}
}

func emit(t *testing.T, b *broker.Broker, payloads ...string) {
	t.Helper()
	for _, p := range payloads {
		if err := b.Publish(t.Context(), broker.Message{Topic: alarm, Payload: []byte(p), QoS: 1}); err != nil {
			t.Fatal(err)
		}
	}
}

// An event is in the log when it is acknowledged, with all that its publisher
// said of it, and goes to local subscribers as ever. What the cloud took leaves.
func TestEventLog(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir, logged(1<<20, 0))
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "fl/plant-7/event/#", Qos: 1})
	r, _ := connect(t, addr, 5, "x")
	before := time.Now().UnixMilli()
	pk := publish(alarm, "1", 1, false, 7)
	pk.Properties = packets.Properties{
		ContentType: "text/plain", MessageExpiryInterval: 3600,
		User: []packets.UserProperty{{Key: "unit", Val: "bar"}, {Key: payload.EventSeq, Val: "99"}, {Key: "unit", Val: "mbar"}},
	}
	r.send(pk)
	if ack := r.expect(packets.Puback); ack.ReasonCode != 0 {
		t.Fatalf("got %+v", ack)
	}
	r.send(publish(alarm, "2", 2, false, 8))
	r.expect(packets.Pubrec)
	r.send(publish(alarm, "3", 0, false, 0))
	r.publish("users/topic", "no event", false)
	r.publish("fl/plant-7/set/default/event/x", "1", false)
	if ack := r.publish(string(topic.EventGap(pump)), "{}", false); ack.ReasonCode != broker.CodeNotAuthorized || !strings.Contains(ack.Properties.ReasonString, "the node's agent") {
		t.Errorf("a client published a gap: 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	for _, want := range []string{"1", "2", "3"} {
		if m := sub.next(); string(m.Payload) != want {
			t.Errorf("the subscriber got %q, want %q", m.Payload, want)
		}
	}

	log := events(t, b)
	if got := show(log); got != "1 1, 2 2, 3 3" {
		t.Fatalf("log: %s", got)
	}
	e := log[0]
	if e.Topic != alarm || e.QoS != 1 || e.Props.ContentType != "text/plain" || fmt.Sprint(e.Props.User) != "[[unit bar] [unit mbar]]" ||
		e.Time < before || e.Expires < before+3_500_000 || e.Epoch == 0 {
		t.Errorf("got %+v", e)
	}
	for _, x := range log[1:] {
		if x.Epoch != e.Epoch {
			t.Error("two epochs in one run")
		}
	}
	if l := b.EventBacklog(); l.Count != 3 || l.Bytes != log[2].Sum || l.Oldest != e.Time || l.Dropped != 0 {
		t.Errorf("backlog %+v", l)
	}

	taken(t, b, log[0])
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b, _ = open(t, dir, logged(1<<20, 0))
	emit(t, b, "4")
	again := events(t, b)
	if got := show(again); got != "2 2, 3 3, 4 4" {
		t.Fatalf("log after the restart: %s", got)
	}
	if again[0].Epoch != e.Epoch || again[2].Epoch == e.Epoch {
		t.Errorf("epochs %x, %x, %x: want the first, the first, another", again[0].Epoch, again[1].Epoch, again[2].Epoch)
	}
	if l := b.EventBacklog(); l.Count != 3 || l.Bytes != again[2].Sum-again[0].Before || l.Oldest != again[0].Time {
		t.Errorf("backlog %+v", l)
	}
	taken(t, b, again[2])
	taken(t, b, again[0]) // a late word changes nothing
	if l := b.EventBacklog(); l != (broker.EventBacklog{}) || len(events(t, b)) != 0 {
		t.Errorf("backlog %+v, log %s", l, show(events(t, b)))
	}
	emit(t, b, "5")
	if got := show(events(t, b)); got != "5 5" {
		t.Errorf("log: %s", got)
	}
}

// Without a bound there is no log, and events go to subscribers alone.
func TestNoEventLog(t *testing.T) {
	b, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x")
	r.subscribe(packets.Subscription{Filter: alarm, Qos: 1})
	r.send(publish(alarm, "1", 1, false, 7))
	for range 2 {
		if pk, err := r.read(); err != nil || pk.ReasonCode != 0 {
			t.Fatal(pk, err)
		}
	}
	if len(events(t, b)) != 0 {
		t.Errorf("log: %s", show(events(t, b)))
	}
}

// The bound in bytes drops the oldest, and one marker stands for all of them,
// whatever was dropped, taken or restarted in between.
func TestEventBytes(t *testing.T) {
	const bound = 64 << 10
	dir := t.TempDir()
	reg := prometheus.NewRegistry()
	b, _ := open(t, dir, logged(bound, 0), func(o *broker.Options) { o.Metrics = reg })
	total, n := 0, 0
	batch := func(count int) {
		t.Helper()
		var ms []broker.Message
		for range count {
			n++
			ms = append(ms, broker.Message{Topic: alarm, Payload: []byte(strconv.Itoa(n) + strings.Repeat(".", n%150)), QoS: 1})
		}
		if err := b.Publish(t.Context(), ms...); err != nil {
			t.Fatal(err)
		}
		total += count
	}
	check := func() []store.Event {
		t.Helper()
		log := events(t, b)
		if len(log) == 0 || log[0].Gap == nil {
			t.Fatalf("no marker at the head: %.100s", show(log))
		}
		count, bytes := log[0].Dropped()
		l := b.EventBacklog()
		if l.Count != uint64(len(log)-1) || l.Dropped != count || l.Bytes > bound || l.Bytes != log[len(log)-1].Sum-log[0].Sum || l.Oldest != log[1].Time {
			t.Errorf("backlog %+v, log of %d", l, len(log))
		}
		if log[0].Gap.From+count != log[1].Seq || log[0].Gap.Before+bytes != log[1].Before {
			t.Errorf("the gap from %d of %d events and %d bytes does not end at %+v", log[0].Gap.From, count, bytes, log[1])
		}
		for i, e := range log[1:] {
			want := total - len(log) + 2 + i
			if got, _, _ := strings.Cut(string(e.Payload), "."); e.Seq != uint64(want) || got != strconv.Itoa(want) {
				t.Fatalf("want event %d, got %d %s", want, e.Seq, e.Payload)
			}
		}
		return log
	}
	batch(100)
	if log := events(t, b); log[0].Gap != nil || len(log) != 100 {
		t.Fatalf("dropped below the bound: %s", show(log))
	}
	batch(900) // more than the bound in one batch
	log := check()
	if log[0].Gap.From != 1 {
		t.Errorf("the gap begins at %d", log[0].Gap.From)
	}
	if l := b.EventBacklog(); l.Bytes < bound*3/4 {
		t.Errorf("%d bytes are left of %d: too much was dropped", l.Bytes, bound)
	}
	for range 500 {
		batch(1)
	}
	if log = check(); log[0].Gap.From != 1 {
		t.Errorf("the gap begins at %d", log[0].Gap.From)
	}
	if got := dropped(t, reg, "bytes"); got != int(log[0].Seq) {
		t.Errorf("the metric counts %d dropped, want %d", got, log[0].Seq)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b, _ = open(t, dir, logged(bound, 0))
	if again := check(); show(again) != show(log) {
		t.Errorf("after the restart\n%s\nwant\n%s", show(again), show(log))
	}

	// What is under way when it is dropped arrives nevertheless: the gap begins
	// behind it. The marker itself is taken like an event.
	way := log[10]
	batch(1000)
	taken(t, b, way)
	log = check()
	if log[0].Gap.From != way.Seq+1 || log[0].Gap.Before != way.Sum {
		t.Errorf("gap %+v, want it behind %d", *log[0].Gap, way.Seq)
	}
	taken(t, b, log[0])
	if left := events(t, b); left[0].Seq != log[1].Seq || left[0].Gap != nil || b.EventBacklog().Dropped != 0 {
		t.Errorf("after the marker was taken: %.100s", show(left))
	}

	// An event that does not fit at all is refused rather than dropped at once.
	var r *broker.Refusal
	err := b.Publish(t.Context(), broker.Message{Topic: alarm, Payload: make([]byte, bound), QoS: 1})
	if !errors.As(err, &r) || r.Code != broker.CodeQuotaExceeded {
		t.Errorf("got %v", err)
	}
}

func dropped(t *testing.T, reg *prometheus.Registry, bound string) int {
	t.Helper()
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			if f.GetName() == "fairlead_broker_events_dropped_total" && m.GetLabel()[0].GetValue() == bound {
				return int(m.GetCounter().GetValue())
			}
		}
	}
	t.Fatal("no such metric")
	return 0
}

// The bound in age drops what is too old, also while nothing is published; a
// clock that has not been set makes nothing old.
func TestEventAge(t *testing.T) {
	b, _ := open(t, t.TempDir(), logged(1<<20, time.Hour))
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	at := func(x time.Time) {
		t.Helper()
		if err := b.SetEventClock(t.Context(), func() time.Time { return x }); err != nil {
			t.Fatal(err)
		}
	}
	tick := func(want string) {
		t.Helper()
		if err := b.TickEvents(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := show(events(t, b)); got != want {
			t.Errorf("log: %s, want %s", got, want)
		}
	}
	at(now)
	emit(t, b, "a", "b")
	at(now.Add(30 * time.Minute))
	emit(t, b, "c")
	tick("1 a, 2 b, 3 c")
	at(now.Add(time.Hour + time.Millisecond))
	tick("gap 1-2, 3 c")
	at(now.Add(2 * time.Hour))
	tick("gap 1-3")
	if l := b.EventBacklog(); l.Count != 0 || l.Bytes != 0 || l.Dropped != 3 || l.Oldest != 0 {
		t.Errorf("backlog %+v", l)
	}
	at(time.Unix(100, 0)) // the board woke up without a battery
	emit(t, b, "d")
	at(now.Add(3 * time.Hour))
	emit(t, b, "e")
	tick("gap 1-3, 4 d, 5 e")
	taken(t, b, events(t, b)[1])
	at(now.Add(3*time.Hour + time.Minute))
	emit(t, b, "f")
	at(now.Add(4*time.Hour + time.Second)) // a publish finds it as well
	emit(t, b, "g")
	if got := show(events(t, b)); got != "gap 5-5, 6 f, 7 g" {
		t.Errorf("log: %s", got)
	}
	at(time.Unix(200, 0)) // a clock that is lost in between keeps what follows, too
	emit(t, b, "h")
	at(now.Add(4*time.Hour + time.Minute))
	emit(t, b, "i")
	at(now.Add(9 * time.Hour))
	tick("gap 5-7, 8 h, 9 i")
}

// A power cut at any moment: what was acknowledged is in the log or was taken,
// the numbers are without a hole, the order is each publisher's, and the new run
// counts in an epoch of its own.
func TestEventsCrash(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewCrashableMem()
	const bound = 32 << 10
	b, addr := open(t, "/store", logged(bound, 0), func(o *broker.Options) { o.Store.FS = fs; o.Checkpoint = time.Hour })
	const publishers = 3
	var acked [publishers]atomic.Int64
	var gone atomic.Uint64 // taken
	var taking atomic.Bool
	taking.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for p := range publishers {
		r, _ := connect(t, addr, 5, fmt.Sprint(p))
		wg.Go(func() {
			for i := int64(1); ctx.Err() == nil; i++ {
				_, err := r.Write(encode(t, 5, publish(alarm, fmt.Sprintf("%d %d", p, i), 1, false, 7)))
				if err == nil {
					_, err = r.read()
				}
				if err != nil {
					t.Error(err)
					return
				}
				acked[p].Store(i)
			}
		})
	}
	wg.Go(func() { // the link
		for ctx.Err() == nil {
			page, err := b.Events(0, 10)
			if err != nil {
				t.Error(err)
				return
			}
			if len(page) == 0 || !taking.Load() {
				time.Sleep(time.Millisecond)
				continue
			}
			last := page[rand.IntN(len(page))]
			gone.Store(max(gone.Load(), last.Seq)) // the log may not know of the last word yet
			if err := b.EventsTaken(ctx, last); err != nil {
				return
			}
		}
	})
	for round := range 40 {
		taking.Store(round%4 < 2) // and outages, with drops
		from := acked[0].Load()
		eventually(t, "progress", func() bool { return acked[0].Load() > from+60 })
		var before [publishers]int64
		for p := range before {
			before[p] = acked[p].Load()
		}
		clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(3) * 50, RNG: rng})
		goneBy := gone.Load()
		crashed, err := broker.Open(broker.Options{
			Dir: "/store", Node: pump, Store: store.Options{FS: clone}, EventBytes: bound,
			Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, nil },
		})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		log := events(t, crashed)
		var newest [publishers]int64
		for i, e := range log {
			if i > 0 && e.Seq != log[i-1].Seq+1 {
				t.Fatalf("round %d: a hole: %s", round, show(log))
			}
			if e.Gap != nil {
				if i > 0 {
					t.Errorf("round %d: a gap in the middle: %s", round, show(log))
				}
				continue
			}
			var p int
			var n int64
			if _, err := fmt.Sscan(string(e.Payload), &p, &n); err != nil {
				t.Fatal(err)
			}
			if newest[p] > 0 && n != newest[p]+1 {
				t.Errorf("round %d: publisher %d: %d after %d", round, p, n, newest[p])
			}
			newest[p] = n
		}
		// All that is missing at the front was taken or is in the marker.
		if len(log) > 0 && log[0].Gap == nil && log[0].Seq > goneBy+1 || len(log) > 0 && log[0].Gap != nil && log[0].Gap.From > goneBy+1 {
			t.Errorf("round %d: taken up to %d, and then %.80s", round, goneBy, show(log))
		}
		for p := range before {
			// An empty rest of a publisher: all of it may have been taken.
			if newest[p] > 0 && newest[p] < before[p] {
				t.Errorf("round %d: publisher %d: %d was acknowledged, the log ends with %d", round, p, before[p], newest[p])
			}
		}
		emit(t, crashed, "after")
		after := events(t, crashed)
		if end := after[len(after)-1]; len(log) > 0 && (end.Seq != log[len(log)-1].Seq+1 || end.Epoch == log[len(log)-1].Epoch) {
			t.Errorf("round %d: %d of epoch %x follows %d of epoch %x", round, end.Seq, end.Epoch, log[len(log)-1].Seq, log[len(log)-1].Epoch)
		}
		if err := crashed.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
}

// A disk that is full or fails refuses events as it refuses everything else.
func TestEventsDiskFull(t *testing.T) {
	dir := smallDisk(t)
	b, addr := open(t, filepath.Join(dir, "store"), logged(1<<20, 0), func(o *broker.Options) { o.Store.ReserveBytes = 32 << 20 })
	r, _ := connect(t, addr, 5, "x")
	r.publish(alarm, "1", false)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "full", func() bool { return b.StoreErr() != nil })
	if ack := r.publish(alarm, "2", false); ack.ReasonCode != broker.CodeQuotaExceeded || !hasAll(ack.Properties.ReasonString, "disk full", "make room") {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room", func() bool { return b.StoreErr() == nil })
	r.publish(alarm, "3", false)
	if got := show(events(t, b)); got != "1 1, 2 3" {
		t.Errorf("log: %s", got)
	}
}

func TestEventsStoreFails(t *testing.T) {
	if !alone(t) {
		return
	}
	fs, full := fullable()
	b, addr := open(t, "/store", logged(1<<20, 0), func(o *broker.Options) { o.Store.FS = fs })
	r, _ := connect(t, addr, 5, "x")
	r.subscribe(packets.Subscription{Filter: alarm, Qos: 1})
	r.publish("a", "1", true)
	full.Store(true)
	if ack := r.publish(alarm, "1", false); ack.ReasonCode != broker.CodeImplementation {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	r.nothing() // and nobody sees it
	if l := b.EventBacklog(); l.Count != 0 {
		t.Errorf("backlog %+v", l)
	}
}

// nodes authenticates the nodes of a cloud broker by their name.
func nodes(o *broker.Options) {
	o.Node, o.Durability = "", broker.CloudDurability
	o.Authenticate = func(ci broker.ConnectInfo) (access.Identity, error) {
		if name, ok := strings.CutPrefix(ci.Username, "node:"); ok {
			return access.Identity{Role: access.Node, Name: name}, nil
		}
		return access.Identity{Role: access.Operator}, nil
	}
}

// numbered is an event of a node's log.
func numbered(t string, p string, epoch string, seq uint64, first bool) packets.Packet {
	pk := publish(t, p, 1, false, uint16(seq%60000)+1)
	id := payload.EventID{Epoch: epoch, Seq: seq, Time: 1, First: first}
	for _, u := range id.UserProperties() {
		pk.Properties.User = append(pk.Properties.User, packets.UserProperty{Key: u[0], Val: u[1]})
	}
	return pk
}

// gapPayload is the marker of a gap.
func gapPayload(epoch string, from, to uint64) string {
	return string(payload.Encode(payload.EventGap{Epoch: epoch, From: from, To: to, Count: to - from + 1, T: 1}))
}

// The cloud broker takes each event of a node once, over restarts of its own and
// of the node, and counts what is missing.
func TestEventsOnce(t *testing.T) {
	dir := t.TempDir()
	reg := prometheus.NewRegistry()
	start := func() (*broker.Broker, *raw, *raw) {
		reg = prometheus.NewRegistry()
		b, addr := open(t, dir, nodes, func(o *broker.Options) { o.Metrics = reg })
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "fl/+/event/#", Qos: 1})
		n, _ := connect(t, addr, 5, "n", user("node:plant-7"))
		return b, n, sub
	}
	b, n, sub := start()
	gapTopic := string(topic.EventGap(pump))
	step := func(pk packets.Packet, arrives bool) {
		t.Helper()
		n.send(pk)
		if ack := n.expect(packets.Puback); ack.ReasonCode != 0 {
			t.Errorf("%s: 0x%02x %q", pk.Payload, ack.ReasonCode, ack.Properties.ReasonString)
		}
		if !arrives {
			sub.nothing()
		} else if m := sub.next(); string(m.Payload) != string(pk.Payload) || len(m.Properties.User) != len(pk.Properties.User) {
			t.Errorf("got %q %v, want %q %v", m.Payload, m.Properties.User, pk.Payload, pk.Properties.User)
		}
	}
	missing := func(want int) {
		t.Helper()
		if got := counter(t, reg, "fairlead_broker_events_missing_total"); got != want {
			t.Errorf("%d are missing, want %d", got, want)
		}
	}
	step(numbered(alarm, "a5", "a", 5, true), true) // where a node is met first says nothing of what was before
	step(numbered(alarm, "a6", "a", 6, false), true)
	step(numbered(alarm, "a6", "a", 6, false), false)
	step(numbered(alarm, "a5", "a", 5, false), false)
	step(publish(alarm, "no number", 1, false, 7), true)
	step(numbered(alarm, "b7", "b", 7, false), true) // the next run goes on counting
	missing(0)
	step(numbered(gapTopic, gapPayload("b", 8, 20), "b", 20, false), true)
	step(numbered(alarm, "b21", "b", 21, false), true)
	missing(0)
	step(numbered(alarm, "b24", "b", 24, false), true)
	missing(2)
	step(numbered(gapTopic, gapPayload("b", 30, 31), "b", 31, false), true)
	missing(7)
	if got := counter(t, reg, "fairlead_broker_events_duplicate_total"); got != 2 {
		t.Errorf("%d duplicates, want 2", got)
	}

	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b, n, sub = start()
	step(numbered(alarm, "b31", "b", 31, true), false)
	step(numbered(alarm, "a6", "a", 6, true), false)  // a copy of the disk, with what was sent long ago
	step(numbered(alarm, "a7", "a", 7, false), true)  // and what was not
	step(numbered(alarm, "c8", "c", 8, false), true)  // the copy's own run
	step(numbered(alarm, "d1", "d", 1, true), true)   // a log that began anew
	step(numbered(alarm, "b32", "b", 32, true), true) // the first one is not forgotten
	missing(0)
	step(numbered(alarm, "e40", "e", 40, true), true)
	missing(7)

	// Epochs are remembered up to a bound; the one that is used least goes.
	for i := range 70 {
		step(numbered(alarm, "x", fmt.Sprintf("x%d", i), uint64(41+i), true), true)
		if i%10 == 0 {
			step(numbered(alarm, "b", "b", uint64(33+i/10), true), true)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, n, sub = start()
	step(numbered(alarm, "x", "x69", 110, true), false)
	step(numbered(alarm, "b", "b", 33, true), false)
	step(numbered(alarm, "x", "x0", 41, true), true)

	n.send(numbered("fl/plant-8/event/x", "", "a", 99, true))
	if ack := n.expect(packets.Puback); ack.ReasonCode != broker.CodeNotAuthorized {
		t.Errorf("got 0x%02x", ack.ReasonCode)
	}
}

// moody refuses events while told to.
type moody struct{ refuse atomic.Bool }

func (m *moody) Intercept(*broker.Message) ([]broker.Message, error) {
	if m.refuse.Load() {
		return nil, &broker.Refusal{Code: broker.CodeQuotaExceeded, Kind: "test", Reason: "no room"}
	}
	return nil, nil
}

// After an event that was refused, those behind it are refused as well: taken,
// they would make a duplicate of it when it comes again.
func TestEventsAfterRefusal(t *testing.T) {
	mood := &moody{}
	_, addr := open(t, t.TempDir(), nodes, func(o *broker.Options) { o.Interceptors = []broker.Interceptor{mood} })
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "fl/+/event/#", Qos: 1})
	n, _ := connect(t, addr, 5, "n", user("node:plant-7"))
	other, _ := connect(t, addr, 5, "o", user("node:plant-8"))
	say := func(r *raw, pk packets.Packet, code byte) {
		t.Helper()
		r.send(pk)
		if ack := r.expect(packets.Puback); ack.ReasonCode != code {
			t.Errorf("%s: got 0x%02x %q, want 0x%02x", pk.Payload, ack.ReasonCode, ack.Properties.ReasonString, code)
		}
		if code == 0 {
			if m := sub.next(); string(m.Payload) != string(pk.Payload) {
				t.Errorf("got %q, want %q", m.Payload, pk.Payload)
			}
		}
	}
	say(n, numbered(alarm, "1", "a", 1, true), 0)
	mood.refuse.Store(true)
	say(n, numbered(alarm, "2", "a", 2, false), broker.CodeQuotaExceeded)
	mood.refuse.Store(false)
	say(n, numbered(alarm, "3", "a", 3, false), broker.CodeImplementation)
	say(n, numbered(alarm, "4", "a", 4, false), broker.CodeImplementation)
	say(other, numbered("fl/plant-8/event/x", "8-1", "b", 1, true), 0)
	say(n, numbered(alarm, "2", "a", 2, true), 0)
	say(n, numbered(alarm, "3", "a", 3, false), 0)

	pk := numbered(alarm, "bad", "a", 4, false)
	pk.Properties.User[1].Val = "four"
	say(n, pk, broker.CodeUnspecified)
	say(n, numbered(alarm, "5", "a", 5, false), broker.CodeImplementation)
	say(n, numbered(alarm, "4", "a", 4, true), 0)
}

// In the cloud, too, an event that could not be stored is not taken, and what is
// behind it waits for it.
func TestEventsCloudStoreFails(t *testing.T) {
	if !alone(t) {
		return
	}
	fs, full := fullable()
	_, addr := open(t, "/store", nodes, func(o *broker.Options) { o.Store.FS = fs })
	n, _ := connect(t, addr, 5, "n", user("node:plant-7"))
	n.send(numbered(alarm, "1", "a", 1, true))
	if ack := n.expect(packets.Puback); ack.ReasonCode != 0 {
		t.Errorf("got 0x%02x", ack.ReasonCode)
	}
	full.Store(true)
	for seq := range uint64(3) {
		n.send(numbered(alarm, "x", "a", 2+seq, false))
		if ack := n.expect(packets.Puback); ack.ReasonCode != broker.CodeImplementation {
			t.Errorf("event %d: got 0x%02x", 2+seq, ack.ReasonCode)
		}
	}
}

// The mark is on the disk when the event is acknowledged.
func TestEventMarksCrash(t *testing.T) {
	fs := vfs.NewCrashableMem()
	_, addr := open(t, "/store", nodes, func(o *broker.Options) { o.Store.FS = fs })
	n, _ := connect(t, addr, 5, "n", user("node:plant-7"))
	for seq := uint64(1); seq <= 50; seq++ {
		n.send(numbered(alarm, "x", "a", seq, seq == 1))
		n.expect(packets.Puback)
		s, _, err := store.Open("/store", store.Options{FS: fs.CrashClone(vfs.CrashCloneCfg{})})
		if err != nil {
			t.Fatal(err)
		}
		got := uint64(0)
		err = s.EachMark(func(node, epoch string, m store.Mark) error {
			if node == pump && epoch == "a" {
				got = m.Seq
			}
			return nil
		})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		if got != seq {
			t.Fatalf("event %d was acknowledged, the mark is %d", seq, got)
		}
	}
}

// A power cut of the cloud's host in the middle of a replay: the node sends
// again what was not acknowledged, and a persistent session has every event once
// and in order.
func TestEventsOnceCrash(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	persistent := func(pk *packets.Packet) {
		pk.Connect.Clean = false
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = 3600, true
	}
	const total, window = 300, 64
	repeated := 0
	for round := range 20 {
		fs := vfs.NewCrashableMem()
		onDisk := func(fs vfs.FS) (*broker.Broker, string, *prometheus.Registry) {
			reg := prometheus.NewRegistry()
			b, addr := open(t, "/store", nodes, func(o *broker.Options) { o.Store.FS, o.Metrics = fs, reg })
			return b, addr, reg
		}
		b, addr, _ := onDisk(fs)
		sub, _ := connect(t, addr, 5, "sub", persistent)
		sub.subscribe(packets.Subscription{Filter: "fl/+/event/#", Qos: 1})
		sub.bye(0)
		sub.closed()
		// replay sends the events behind the one that was acknowledged last, up to
		// the given number of answers.
		replay := func(addr string, acked, until int) int {
			n, _ := connect(t, addr, 5, "n", user("node:plant-7"))
			first := acked + 1
			for sent := acked; acked < until; {
				for ; sent < total && sent < acked+window; sent++ {
					n.send(numbered(alarm, strconv.Itoa(sent+1), "a", uint64(sent+1), sent+1 == first))
				}
				if ack := n.expect(packets.Puback); ack.ReasonCode != 0 || int(ack.PacketID) != acked+2 {
					t.Fatalf("round %d: answer %+v after %d", round, ack, acked)
				}
				acked++
			}
			return acked
		}
		acked := replay(addr, 0, rng.IntN(total-window))
		clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(3) * 50, RNG: rng})
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		b, addr, reg := onDisk(clone)
		replay(addr, acked, total)
		repeated += counter(t, reg, "fairlead_broker_events_duplicate_total")
		if missing := counter(t, reg, "fairlead_broker_events_missing_total"); missing != 0 {
			t.Errorf("round %d: %d are missing", round, missing)
		}
		sub, ack := connect(t, addr, 5, "sub", persistent)
		if !ack.SessionPresent {
			t.Fatalf("round %d: the session is gone", round)
		}
		for i := range total {
			if m := sub.next(); string(m.Payload) != strconv.Itoa(i+1) {
				t.Fatalf("round %d, acknowledged %d: want event %d, got %s", round, acked, i+1, m.Payload)
			}
		}
		sub.nothing()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if repeated == 0 {
		t.Error("in no round was an event taken whose acknowledgement was lost: this test tests nothing")
	}
}
