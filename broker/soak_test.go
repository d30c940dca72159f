package broker_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// TestSoak runs a mixed load for minutes, with restarts of the broker in its
// midst: `go tool task test:soak`. Each cycle begins with a store that has no
// sessions and no retained messages, and ends so; what the process holds then,
// goroutines and memory, must not become more.
func TestSoak(t *testing.T) {
	if *soakFlag == 0 {
		t.Skip("SKIP: takes ten minutes; run it with `go tool task test:soak`")
	}
	s, dir := seed(), filepath.Join(t.TempDir(), "store")
	t.Logf("seed %d", s)
	k := &soak{t: t, dir: dir}
	if err := k.start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := k.b.Close(); err != nil {
			t.Error(err)
		}
	}()
	var goroutines int
	var heap uint64
	cycles := 0
	for end := time.Now().Add(*soakFlag); time.Now().Before(end); cycles++ {
		if log, err := k.cycle(s + uint64(cycles)); err != nil {
			t.Fatalf("cycle %d, seed %d: %v\nhistory:\n%s", cycles, s+uint64(cycles), err, history(log))
		}
		const warm = 3 // cycles until pools and caches are what they stay
		eventually(t, "the goroutines of the clients end", func() bool {
			return cycles < warm || runtime.NumGoroutine() <= goroutines
		})
		runtime.GC()
		runtime.GC() // sync.Pools are emptied by the second
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		fmt.Fprintf(os.Stderr, "soak: cycle %d: %d messages, %d deliveries, %d goroutines, heap %.1f MB, store %.1f MB\n",
			cycles, k.messages, k.deliveries, runtime.NumGoroutine(), float64(m.HeapAlloc)/1e6, float64(size(dir))/1e6)
		if cycles < warm {
			goroutines, heap = max(goroutines, runtime.NumGoroutine()), max(heap, m.HeapAlloc)
			continue
		}
		if limit := heap + heap/2 + 4<<20; m.HeapAlloc > limit {
			t.Errorf("cycle %d: the heap has %d bytes; it had %d after cycle %d", cycles, m.HeapAlloc, heap, warm)
		}
	}
	t.Logf("%d cycles, %d messages, %d deliveries", cycles, k.messages, k.deliveries)
}

type soak struct {
	t                    *testing.T
	dir, addr            string
	b                    *broker.Broker
	messages, deliveries int
}

// start opens the broker. It is not the helper of the other tests, whose
// clean-up would keep each broker until the end.
func (k *soak) start() error {
	b, err := onMem(nil, func(o *broker.Options) { o.Dir = k.dir })
	if err != nil {
		return err
	}
	addr, err := b.Listen("127.0.0.1:0")
	k.b, k.addr = b, strings.TrimPrefix(addr, "mqtt://")
	return err
}

func (k *soak) dial() (net.Conn, error) { return net.Dial("tcp", k.addr) }

// cycle is some seconds of load, a restart, some more load, and the end of all
// sessions and retained messages.
func (k *soak) cycle(s uint64) ([]entry, error) {
	rng := rand.New(rand.NewPCG(s, 6))
	var log []entry
	var l *ledger
	for part := range 2 {
		if part == 0 {
			l = newLedger(s, crashClients)
		} else {
			l = replay(s, log)
		}
		l.lax = true
		c := newCrew(l, log)
		c.dial = k.dial
		c.note("a broker", func(l *ledger) []packets.Packet { l.lax, l.started = true, l.now; return nil })
		until := time.Now().Add(2 * time.Second)
		err := k.settled(c)
		for err == nil && time.Now().Before(until) {
			err = c.work(rng, 50, func(time.Duration) { time.Sleep(time.Millisecond) })
		}
		if err == nil && part == 1 {
			err = k.settled(c)
		}
		if err == nil && part == 1 {
			err = c.mu.l.retained(func(name string) (string, bool) {
				p, ok := k.b.Retained(topic.Topic(name))
				return string(p), ok
			})
		}
		log = c.stop()
		if part == 0 && err == nil {
			err = k.b.Close()
			if err == nil {
				err = k.start()
			}
		}
		c.tasks.Wait()
		log = append(log[:len(log):len(log)], entry{time.Now(), "all clients are cut", func(l *ledger) []packets.Packet { l.crash(); return nil }})
		if err != nil {
			return log, err
		}
	}
	for _, m := range l.msgs {
		k.messages += min(m.sends, 1)
	}
	for _, e := range log {
		if strings.Contains(e.text, " got Publish") {
			k.deliveries++
		}
	}
	return log, k.clear(l)
}

// settled brings all clients up and waits until nobody is owed anything.
func (k *soak) settled(c *crew) error {
	deadline := time.Now().Add(patience)
	for n := range crashClients {
		for {
			c.mu.Lock()
			up, connecting := c.mu.l.clients[n].up, c.mu.l.clients[n].connecting
			c.mu.Unlock()
			if up || connecting {
				c.send(n, "answers all", func(l *ledger) []packets.Packet { return l.release(n) })
				break
			}
			if err := c.connect(n, false, false); err != nil {
				return err
			}
		}
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C {
		if err := c.err(); err != nil {
			return err
		}
		m := c.missing()
		if m == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("lost: " + m)
		}
	}
}

// clear ends all sessions and clears all topics.
func (k *soak) clear(l *ledger) error {
	for _, c := range l.clients {
		nc, err := k.dial()
		if err != nil {
			return err
		}
		w := newWire(nc, 4) // whose clean session ends with it
		if err := w.send(hello(4, fmt.Sprintf("c%d", c.n), true, 0)); err != nil {
			return err
		}
		if _, err := w.next(); err != nil {
			return err
		}
		if c.n == 0 {
			for name := range l.topics {
				if err := w.send(publish(name, "", 1, true, 1)); err != nil {
					return err
				}
				if _, err := w.next(); err != nil {
					return err
				}
			}
		}
		_ = w.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
		_, err = w.next() // the broker hangs up
		_ = w.Close()
		if err == nil {
			return errors.New("a packet after DISCONNECT")
		}
	}
	return nil
}

// size is what the files of a folder hold.
func size(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if fi, err := d.Info(); err == nil {
				n += fi.Size()
			}
		}
		return nil
	})
	return n
}
