package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// An acknowledged message is there after a power cut at any moment; what was
// cleared does not come back; a reading is lost at most back to the last
// checkpoint. The crash shows in a copy of the file system.
func TestCrash(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewCrashableMem()
	b, addr := open(t, "/store", func(o *broker.Options) { o.Store.FS = fs; o.Checkpoint = time.Hour })

	const publishers, topics = 4, 20
	var mu sync.Mutex
	acked := map[string]int{} // topic → the newest version acknowledged; odd ones are clears
	sent := map[string]int{}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for p := range publishers {
		r, _ := connect(t, addr, 5, fmt.Sprint(p))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("t/%d/%d", p, i%topics)
				v := i/topics + 1
				payload := fmt.Sprint(v)
				if v%2 == 1 && v > 1 {
					payload = ""
				}
				mu.Lock()
				sent[name] = v
				mu.Unlock()
				if _, err := r.Write(encode(t, 5, publish(name, payload, byte(1+i%2), true, 7))); err != nil {
					t.Error(err)
					return
				}
				pk, err := r.read()
				if err != nil || pk.ReasonCode != 0 {
					t.Errorf("%+v, %v", pk, err)
					return
				}
				mu.Lock()
				acked[name] = v
				mu.Unlock()
				if pk.FixedHeader.Type == packets.Pubrec {
					if _, err := r.Write(encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: 7})); err != nil {
						t.Error(err)
						return
					}
					if _, err := r.read(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		}()
	}
	for round := range 30 {
		eventually(t, "progress", func() bool {
			mu.Lock()
			defer mu.Unlock()
			n := 0
			for _, v := range acked {
				n += v
			}
			return n > 20*(round+1)
		})
		mu.Lock()
		before := map[string]int{}
		for k, v := range acked {
			before[k] = v
		}
		mu.Unlock()
		after := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(3) * 50, RNG: rng})
		mu.Lock()
		latest := map[string]int{}
		for k, v := range sent {
			latest[k] = v
		}
		mu.Unlock()
		s, _, err := store.Open("/store", store.Options{FS: after})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got := map[string]int{}
		err = s.EachRetained(func(r store.Retained) error {
			var v int
			_, err := fmt.Sscan(string(r.Payload), &v)
			got[r.Topic] = v
			return err
		})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for name, v := range before {
			g, there := got[name]
			cleared := v%2 == 1 && v > 1
			switch {
			case there && g < v:
				t.Errorf("round %d: %s has version %d, %d was acknowledged", round, name, g, v)
			case there && g > latest[name]:
				t.Errorf("round %d: %s has version %d, %d was sent", round, name, g, latest[name])
			case !there && !cleared && latest[name] == v:
				t.Errorf("round %d: %s is gone, version %d was acknowledged", round, name, v)
			}
		}
	}
	cancel()
	wg.Wait()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestReadingsAreCheckpointed(t *testing.T) {
	fs := vfs.NewCrashableMem()
	open1 := func(fs vfs.FS, every time.Duration) (*broker.Broker, *raw) {
		b, addr := open(t, "/store", func(o *broker.Options) { o.Store.FS = fs; o.Checkpoint = every })
		r, _ := connect(t, addr, 5, "x", user("mapper"))
		return b, r
	}
	b, r := open1(fs, time.Hour)
	r.publish(reading, "1", true)
	r.publish("synced", "1", true)
	crash := fs.CrashClone(vfs.CrashCloneCfg{})
	if err := b.Close(); err != nil { // a clean end loses nothing
		t.Fatal(err)
	}
	b, _ = open1(crash, time.Hour)
	if p, ok := b.Retained(topic.Topic(reading)); ok {
		t.Errorf("a reading was written at once: %q", p)
	}
	if p, _ := b.Retained("synced"); string(p) != "1" {
		t.Errorf("what was acknowledged is lost: %q", p)
	}
	b, r = open1(fs, 10*time.Millisecond)
	if p, _ := b.Retained(topic.Topic(reading)); string(p) != "1" {
		t.Errorf("got %q", p)
	}
	r.publish(reading, "2", true)
	recovered := func(fs *vfs.MemFS) (p string) {
		s, _, err := store.Open("/store", store.Options{FS: fs.CrashClone(vfs.CrashCloneCfg{})})
		if err != nil {
			t.Fatal(err)
		}
		err = s.EachRetained(func(r store.Retained) error {
			if r.Topic == reading {
				p = string(r.Payload)
			}
			return nil
		})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		return p
	}
	eventually(t, "checkpoint", func() bool { return recovered(fs) == "2" })
	// What is cleared stays cleared.
	r.publish(reading, "", true)
	r.publish("synced", "2", true)
	if p := recovered(fs); p != "" {
		t.Errorf("got %q", p)
	}
}

// memory is an interceptor that remembers what it saw, and whether it was undone.
type memory struct {
	seen   []topic.Topic
	undone int
}

func (m *memory) Intercept(msg *broker.Message) ([]broker.Message, error) {
	m.seen = append(m.seen, msg.Topic)
	return nil, nil
}

func (m *memory) Undone() { m.undone++ }

// smallDisk is a file system of 64 MiB of its own.
func smallDisk(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("SKIP: cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// A full disk refuses what must be stored with 0x97, keeps what was there, takes
// readings, and takes everything again when there is room.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t)
	mem := &memory{}
	b, addr := open(t, filepath.Join(dir, "store"), func(o *broker.Options) {
		o.Interceptors = []broker.Interceptor{mem}
		o.Store.ReserveBytes = 32 << 20
	})
	r, _ := connect(t, addr, 5, "x", user("mapper"))
	v3, _ := connect(t, addr, 4, "v3", user("mapper"))
	sub, _ := connect(t, addr, 5, "sub")
	r.publish("kept", "old", true)
	sub.subscribe(packets.Subscription{Filter: "kept", Qos: 1, RetainHandling: 2}, packets.Subscription{Filter: reading, Qos: 1})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "full", func() bool { return b.StoreErr() != nil })
	if err := b.StoreErr(); !errors.Is(err, store.ErrDiskFull) || !hasAll(err.Error(), "32 MiB", dir, "make room") {
		t.Errorf("got %v", err)
	}
	ack := r.publish("kept", "new", true)
	if ack.ReasonCode != 0x97 || !hasAll(ack.Properties.ReasonString, "disk full", "make room") {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	r.send(publish("kept", "new", 2, true, 8))
	if rec := r.expect(packets.Pubrec); rec.ReasonCode != 0x97 {
		t.Errorf("got 0x%02x", rec.ReasonCode)
	}
	if p, _ := b.Retained("kept"); string(p) != "old" {
		t.Errorf("the retained value is %q", p)
	}
	if err := b.Publish(t.Context(), broker.Message{Topic: "mine", Payload: []byte("x"), Retain: true}); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	if _, ok := b.Retained("mine"); ok {
		t.Error("a refused message is retained")
	}
	if err := b.Do(t.Context(), func() []broker.Message {
		if mem.undone < 3 {
			t.Errorf("the interceptor was told %d times", mem.undone)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	// Readings and what is not retained need no room, alone and in a batch.
	if ack := r.publish(reading, "1", true); ack.ReasonCode != 0 {
		t.Errorf("reading: 0x%02x", ack.ReasonCode)
	}
	r.write(append(encode(t, 5, publish("kept", "new", 1, true, 1)), encode(t, 5, publish(reading, "2", 1, true, 2))...))
	for range 2 {
		if ack := r.expect(packets.Puback); (ack.ReasonCode == 0) != (ack.PacketID == 2) {
			t.Errorf("got %+v", ack)
		}
	}
	for _, want := range []string{"1", "2"} {
		if m := sub.next(); m.TopicName != reading || string(m.Payload) != want {
			t.Errorf("got %s %q", m.TopicName, m.Payload)
		}
	}
	sub.nothing()
	if p, _ := b.Retained(topic.Topic(reading)); string(p) != "2" {
		t.Errorf("got %q", p)
	}
	// MQTT 3.1.1 has no negative answer: the connection ends.
	v3.send(publish("kept", "new", 1, true, 1))
	for {
		pk, err := v3.read()
		if err != nil {
			break
		}
		t.Errorf("MQTT 3.1.1 got %+v", pk)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room", func() bool { return b.StoreErr() == nil })
	if ack := r.publish("kept", "new", true); ack.ReasonCode != 0 {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	if m := sub.next(); string(m.Payload) != "new" {
		t.Errorf("got %q", m.Payload)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b, _ = open(t, filepath.Join(dir, "store"), func(o *broker.Options) { o.Store.ReserveBytes = 1 })
	if p, _ := b.Retained("kept"); string(p) != "new" {
		t.Errorf("after a restart: %q", p)
	}
	if p, _ := b.Retained(topic.Topic(reading)); string(p) != "2" {
		t.Errorf("after a restart: reading %q", p)
	}
}

// A Will that the full disk did not take, or did not forget, is settled when
// there is room: a broker that is killed later publishes the right ones.
func TestWillsOnFullDisk(t *testing.T) {
	dir := smallDisk(t)
	at := filepath.Join(dir, "store")
	b, addr := open(t, at, func(o *broker.Options) { o.Store.ReserveBytes = 32 << 20; o.Checkpoint = 10 * time.Millisecond })
	_, _ = connect(t, addr, 5, "stays", will("gone/stays", "bye", true))
	leaves, _ := connect(t, addr, 5, "leaves", will("gone/leaves", "bye", true))
	leaves.nothing()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "full", func() bool { return b.StoreErr() != nil })
	late, _ := connect(t, addr, 5, "late", will("gone/late", "bye", true))
	late.nothing()
	leaves.bye(0)
	leaves.closed()
	wills := func() string {
		t.Helper()
		killed := filepath.Join(t.TempDir(), "store")
		if err := os.CopyFS(killed, os.DirFS(at)); err != nil {
			t.Fatal(err)
		}
		s, _, err := store.Open(killed, store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		ws, err := s.Wills()
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		var topics []string
		for _, w := range ws {
			topics = append(topics, w.Topic)
		}
		return fmt.Sprint(topics)
	}
	if got := wills(); got != "[gone/leaves gone/stays]" {
		t.Errorf("while it is full: %s", got)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room", func() bool { return b.StoreErr() == nil })
	eventually(t, "settled", func() bool { return wills() == "[gone/late gone/stays]" })
}

// fullable is a file system that fails every write while full is set.
func fullable() (vfs.FS, *atomic.Bool) {
	var full atomic.Bool
	return errorfs.Wrap(vfs.NewCrashableMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			return syscall.EIO
		}
		return nil
	})), &full
}

// A disk that fails ends in refusals, never in a false success or a dead process.
func TestStoreFails(t *testing.T) {
	if !alone(t) {
		return
	}
	fs, full := fullable()
	b, addr := open(t, "/store", func(o *broker.Options) { o.Store.FS = fs })
	r, _ := connect(t, addr, 5, "x", user("mapper"))
	r.publish("kept", "old", true)
	full.Store(true)
	for range 3 {
		ack := r.publish("kept", "new", true)
		if ack.ReasonCode != 0x83 || !hasAll(ack.Properties.ReasonString, "store failed") {
			t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
		}
	}
	if err := b.StoreErr(); !errors.Is(err, store.ErrFailed) {
		t.Errorf("got %v", err)
	}
	if p, _ := b.Retained("kept"); string(p) != "old" {
		t.Errorf("got %q", p)
	}
	if ack := r.publish(reading, "1", true); ack.ReasonCode != 0 {
		t.Errorf("reading: 0x%02x", ack.ReasonCode)
	}
	if ack := r.publish("live", "1", false); ack.ReasonCode != 0 {
		t.Errorf("not retained: 0x%02x", ack.ReasonCode)
	}
}

// Damage that shows only when the store is read sets it aside as well.
func TestGarbledTableIsSetAside(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	b, _ := open(t, dir)
	var ms []broker.Message
	for i := range 1000 {
		ms = append(ms, broker.Message{Topic: topicN(i), Payload: []byte(strings.Repeat("x", 3000)), Retain: true})
	}
	if err := b.Publish(t.Context(), ms...); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("no tables: %v", err)
	}
	for _, f := range tables {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for i := len(raw) / 4; i < len(raw)/2; i++ {
			raw[i] ^= 0x5a
		}
		if err := os.WriteFile(f, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, addr := open(t, dir)
	aside := b.SetAside()
	if !strings.HasPrefix(aside, dir+".broken-") {
		t.Fatalf("set aside as %q", aside)
	}
	if left, _ := filepath.Glob(filepath.Join(aside, "*.sst")); len(left) != len(tables) {
		t.Errorf("%d of %d tables are left", len(left), len(tables))
	}
	r, _ := connect(t, addr, 5, "x")
	if ack := r.publish("a", "b", true); ack.ReasonCode != 0 {
		t.Errorf("got %+v", ack)
	}
}

func TestStoreInUse(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	_, err := broker.Open(broker.Options{Dir: dir, Authenticate: func(broker.ConnectInfo) (accessIdentity, error) { return accessIdentity{}, nil }})
	if !errors.Is(err, store.ErrInUse) {
		t.Errorf("got %v", err)
	}
}
