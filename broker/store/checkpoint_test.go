package store_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/fairlead-io/fairlead/broker/store"
)

func TestCheckpoint(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, store.Options{})
	put(t, s, store.Retained{Topic: "a", Payload: []byte("old")}, store.Retained{Topic: "c", Payload: []byte("c")})
	expect := func(want string) {
		t.Helper()
		var got []string
		for _, r := range all(t, s) {
			got = append(got, r.Topic+"="+string(r.Payload))
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("got %s, want %s", g, want)
		}
	}
	check := func(rs ...store.Retained) {
		t.Helper()
		if err := s.Checkpoint(rs); err != nil {
			t.Fatal(err)
		}
	}
	check(store.Retained{Topic: "b", Payload: []byte("1")}, store.Retained{Topic: "a", Payload: []byte("new"), QoS: 1},
		store.Retained{Topic: "b", Payload: []byte("2")})
	expect("a=new b=2 c=c")
	check()
	put(t, s, store.Retained{Topic: "a"}, store.Retained{Topic: "b", Payload: []byte("3")})
	expect("b=3 c=c")
	check(store.Retained{Topic: "c", Payload: []byte("4")})
	expect("b=3 c=4")
	check(store.Retained{Topic: "a", Payload: []byte("5")})
	closed(t, s)
	s, _ = open(t, dir, store.Options{})
	expect("a=5 b=3 c=4")
	if err := s.Checkpoint([]store.Retained{{Topic: "a", Payload: []byte("6")}, {Topic: "b"}}); err == nil || !strings.Contains(err.Error(), `"b"`) {
		t.Errorf("a deletion in a checkpoint: %v", err)
	}
	expect("a=5 b=3 c=4")
}

// A power cut at any moment leaves what was there after some operation, none
// of them in part, and none that was before a synced one or a checkpoint is
// missing: so no older value stands over a newer one, and nothing that was
// deleted is back.
func TestCheckpointPowerCut(t *testing.T) {
	const rounds, ops = 40, 60
	clones := 0
	for seed := range uint64(rounds) {
		clones += powerCuts(t, seed, ops)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("%d power cuts in %d rounds", clones, rounds)
	if clones < rounds {
		t.Error("too few to say anything")
	}
}

type cut struct {
	fs          *vfs.MemFS
	durable, at int // the operation that must have survived, and the last that may have
}

// noReuse keeps a log's file from being used again: MemFS takes a read lock twice
// for that, and a CrashClone that comes between waits for ever.
type noReuse struct{ *vfs.MemFS }

func (fs noReuse) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.Remove(from); err != nil {
		return nil, err
	}
	return fs.Create(to, c)
}

func powerCuts(t *testing.T, seed uint64, ops int) int {
	rnd := rand.New(rand.NewPCG(seed, 1))
	mem := vfs.NewCrashableMem()
	var durable, at atomic.Int64
	var mu sync.Mutex
	var cuts []cut
	chance := rand.New(rand.NewPCG(seed, 2))
	var on atomic.Bool
	fs := errorfs.Wrap(noReuse{mem}, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if !on.Load() || op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if len(cuts) < 12 && chance.IntN(40) == 0 {
			d := int(durable.Load())
			c := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: chance.IntN(3) * 50, RNG: rand.New(rand.NewPCG(seed, uint64(len(cuts))))})
			cuts = append(cuts, cut{c, d, int(at.Load())})
		}
		return nil
	}))
	s, _, err := store.Open("/store", store.Options{FS: fs, MemTableBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	on.Store(true)
	state := map[string]string{}
	states := []map[string]string{maps.Clone(state)}
	for i := 1; i <= ops; i++ {
		var rs []store.Retained
		checkpoint, sync := rnd.IntN(3) == 0, rnd.IntN(2) == 0
		for range 1 + rnd.IntN(6) {
			r := store.Retained{Topic: fmt.Sprintf("t/%02d", rnd.IntN(15))}
			if checkpoint || rnd.IntN(3) > 0 {
				r.Payload = fmt.Appendf(nil, "%d-%s", i, strings.Repeat("x", rnd.IntN(4000)))
			}
			rs = append(rs, r)
			if delete(state, r.Topic); len(r.Payload) > 0 {
				state[r.Topic] = string(r.Payload)
			}
		}
		states = append(states, maps.Clone(state))
		at.Store(int64(i))
		if checkpoint {
			err = s.Checkpoint(rs)
		} else {
			b := s.NewBatch()
			for _, r := range rs {
				b.PutRetained(r)
			}
			err = b.Commit(sync)
		}
		if err != nil {
			t.Fatal(err)
		}
		if checkpoint || sync {
			durable.Store(int64(i))
		}
	}
	on.Store(false)
	closed(t, s)
	mu.Lock()
	defer mu.Unlock()
	for i, c := range cuts {
		s, _, err := store.Open("/store", store.Options{FS: c.fs})
		if err != nil {
			t.Errorf("power cut %d: %v", i, err)
			continue
		}
		got := map[string]string{}
		for _, r := range all(t, s) {
			got[r.Topic] = string(r.Payload)
		}
		found := false
		for k := c.durable; k <= c.at && !found; k++ {
			found = maps.Equal(got, states[k])
		}
		if !found {
			t.Errorf("power cut %d: what is left is the state after none of the operations %d to %d", i, c.durable, c.at)
		}
		closed(t, s)
	}
	return len(cuts)
}

// A disk that is full is said to be, at whatever step, and nothing is lost.
func TestCheckpointDiskFull(t *testing.T) {
	var full atomic.Bool
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && strings.HasSuffix(op.Path, ".new") && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			return syscall.ENOSPC
		}
		return nil
	}))
	s, _ := open(t, "/store", store.Options{FS: fs})
	put(t, s, store.Retained{Topic: "a", Payload: []byte("1")})
	full.Store(true)
	r := []store.Retained{{Topic: "a", Payload: []byte("2")}}
	if err := s.Checkpoint(r); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	if got := all(t, s); len(got) != 1 || string(got[0].Payload) != "1" {
		t.Errorf("got %v", got)
	}
	full.Store(false)
	if err := s.Checkpoint(r); err != nil {
		t.Error(err)
	}
	if got := all(t, s); len(got) != 1 || string(got[0].Payload) != "2" {
		t.Errorf("got %v", got)
	}
}
