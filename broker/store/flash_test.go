package store_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/fairlead-io/fairlead/broker/store"
)

// plant is what a gateway of 50 devices with 100 properties each reports.
type plant struct {
	rnd    *rand.Rand
	at     int64
	values []float64
	topics []string
	seen   []int64
}

func newPlant() *plant {
	p := &plant{rnd: rand.New(rand.NewPCG(3, 14)), at: 1_790_000_000_000}
	for d := range 50 {
		for i := range 100 {
			p.topics = append(p.topics, fmt.Sprintf("fl/plant-7/reported/twin/default/press-%02d/register-%02d", d, i))
			p.values = append(p.values, p.rnd.Float64()*200)
			p.seen = append(p.seen, p.at)
		}
	}
	return p
}

// minute lets 500 properties a second change and gives the topics that did,
// each with its last value.
func (p *plant) minute() []store.Retained {
	changed := make([]bool, len(p.topics))
	for range 60 * 500 {
		i := p.rnd.IntN(len(p.topics))
		p.values[i] += p.rnd.NormFloat64()
		p.at += 2
		p.seen[i] = p.at
		changed[i] = true
	}
	var out []store.Retained
	for i := range p.topics {
		if changed[i] {
			out = append(out, store.Retained{Topic: p.topics[i], QoS: 1,
				Payload: fmt.Appendf(nil, `{"v":%.2f,"t":%d}`, p.values[i], p.seen[i])})
		}
	}
	return out
}

// digest is the record of the digest that follows the readings, six times a minute.
func (p *plant) digest() store.Retained {
	return store.Retained{Topic: "fl/plant-7/reported/digest", QoS: 1,
		Payload: fmt.Appendf(nil, `{"epoch":"c0ffee","count":5003,"digest":"%032x"}`, p.rnd.Uint64())}
}

// asBatch is how a checkpoint would be written without [store.Store.Checkpoint].
func asBatch(s *store.Store, rs []store.Retained) error {
	b := s.NewBatch()
	for _, r := range rs {
		b.PutRetained(r)
	}
	return b.Commit(true)
}

// An hour of readings, 60 checkpoints with time for flushes and compactions
// after each, on the real file system:
//
//	go test ./broker/store -run '^$' -bench ReadingsHour -benchtime 1x -v
func BenchmarkReadingsHour(b *testing.B) {
	for _, how := range []struct {
		name  string
		write func(*store.Store, []store.Retained) error
	}{{"batch", asBatch}, {"checkpoint", (*store.Store).Checkpoint}} {
		b.Run(how.name, func(b *testing.B) {
			for range b.N {
				fs := newCountFS(vfs.Default)
				s, _, err := store.Open(b.TempDir(), store.Options{FS: fs})
				if err != nil {
					b.Fatal(err)
				}
				p := newPlant()
				store.Settle(s)
				before, device := fs.total(), writeBytes(b)
				var took time.Duration
				for range 60 {
					rs := p.minute()
					began := time.Now()
					if err := how.write(s, rs); err != nil {
						b.Fatal(err)
					}
					took += time.Since(began)
					for range 6 {
						put(b, s, p.digest())
					}
					store.Settle(s)
				}
				after := fs.total()
				b.ReportMetric(float64(after.bytes-before.bytes)/1e6, "MB/hour")
				b.ReportMetric(float64(writeBytes(b)-device)/1e6, "deviceMB/hour")
				b.ReportMetric(float64(after.syncs-before.syncs), "syncs/hour")
				b.ReportMetric(float64(took.Microseconds())/60e3, "ms/checkpoint")
				b.ReportMetric(float64(s.DiskUsage())/1e6, "MB-on-disk")
				b.ReportMetric(s.Stats().WriteAmplification, "amplification")
				for kind, c := range fs.by {
					b.Logf("%-11s %6.2f MB %5d writes %4d syncs", kind, float64(c.bytes)/1e6, c.writes, c.syncs)
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// writeBytes is what the kernel sent to the disk for this process, in bytes.
func writeBytes(b *testing.B) int64 {
	io, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(io)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	return 0
}

// An hour of 500 changes a second may write 40 MB with 4,000 syncs. Counted
// where the store meets its file system it is 10 MB; without Checkpoint it would
// be just below 40, so half of the figure is what tells the two apart.
func TestReadingsHour(t *testing.T) {
	fs := newCountFS(vfs.NewMem())
	s, _ := open(t, "/store", store.Options{FS: fs})
	p := newPlant()
	for range 60 {
		if err := s.Checkpoint(p.minute()); err != nil {
			t.Fatal(err)
		}
		for range 6 {
			put(t, s, p.digest())
		}
		store.Settle(s)
	}
	if n := fs.total(); n.bytes > 20e6 || n.syncs > 4000 {
		t.Errorf("%d bytes and %d syncs", n.bytes, n.syncs)
	} else {
		t.Logf("%.1f MB and %d syncs", float64(n.bytes)/1e6, n.syncs)
	}
	if got := all(t, s); len(got) != len(p.topics)+1 {
		t.Errorf("%d messages", len(got))
	}
}

// A store that nobody writes to writes nothing by itself.
func TestIdleWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newCountFS(vfs.NewMem())
		s, _, err := store.Open("/store", store.Options{FS: fs})
		if err != nil {
			t.Fatal(err)
		}
		p := newPlant()
		for range 5 {
			if err := s.Checkpoint(p.minute()); err != nil {
				t.Error(err)
			}
			put(t, s, p.digest())
		}
		synctest.Wait()
		time.Sleep(time.Minute) // whatever Pebble puts off
		before := fs.total()
		if before.bytes == 0 || before.syncs == 0 {
			t.Error("nothing is counted")
		}
		time.Sleep(30 * time.Minute)
		if after := fs.total(); after != before {
			t.Errorf("%+v became %+v", before, after)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}
