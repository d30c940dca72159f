package cloudbridge

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace runs the real queue against simulated time: a device that reports
// ten times a second is written every 10 s, an urgent change within a second of
// the last write, and never two writes within one.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace(time.Second, 10*time.Second)
		q := newQueue()
		var mu sync.Mutex
		var all []time.Time
		take := func() []time.Time { // the writes since it was called last
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			out := all
			all = nil
			return out
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				k, stop := q.Get()
				if stop {
					return
				}
				now := time.Now()
				if wait := p.begin(k.name, now); wait > 0 {
					q.AddAfter(k, wait)
				} else {
					mu.Lock()
					all = append(all, now)
					mu.Unlock()
					p.done(k.name, now)
				}
				q.Done(k)
			}
		}()
		change := func(urgent bool) {
			if wait, ok := p.plan("d", urgent, time.Now()); ok {
				q.AddAfter(key{kindDevice, "d"}, wait)
			}
		}
		begin := time.Now()
		for range 600 {
			change(false)
			time.Sleep(100 * time.Millisecond)
		}
		writes := take()
		if len(writes) != 6 && len(writes) != 7 {
			t.Errorf("%d writes in a minute of readings: %v", len(writes), since(begin, writes))
		}
		time.Sleep(5 * time.Second)
		take()
		begin = time.Now()
		change(true)
		writes = take()
		if len(writes) != 1 || !writes[0].Equal(begin) {
			t.Errorf("an urgent change after a pause: %v", since(begin, writes))
		}
		for range 50 { // a device that flaps ten times a second
			change(true)
			time.Sleep(100 * time.Millisecond)
		}
		writes = append(writes, take()...)
		for i := 1; i < len(writes); i++ {
			if d := writes[i].Sub(writes[i-1]); d < time.Second {
				t.Errorf("two writes within %s", d)
			}
		}
		if len(writes) < 5 || len(writes) > 6 {
			t.Errorf("%d writes in 5 s of urgent changes: %v", len(writes), since(begin, writes))
		}
		q.ShutDown()
		<-done
		time.Sleep(time.Minute) // the queue's own goroutines see the end
	})
}

func since(begin time.Time, ts []time.Time) []time.Duration {
	var out []time.Duration
	for _, t := range ts {
		out = append(out, t.Sub(begin))
	}
	return out
}
