package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/tools/stack"
)

// wire is the network between a node and the cloud.
type wire struct {
	l    net.Listener
	wg   sync.WaitGroup
	mu   sync.Mutex
	up   bool
	open map[net.Conn]struct{}
}

func newWire(t *testing.T) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{l: l, up: true, open: map[net.Conn]struct{}{}}
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.carry(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); w.set(false); w.wg.Wait() })
	return w
}

func (w *wire) carry(near net.Conn) {
	defer func() { _ = near.Close() }()
	w.mu.Lock()
	up := w.up
	w.open[near] = struct{}{}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.open, near)
		w.mu.Unlock()
	}()
	if !up {
		return
	}
	far, err := net.Dial("tcp", fab.CloudMQTT)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	w.wg.Go(func() {
		_, _ = io.Copy(far, near)
		_ = far.Close()
	})
	_, _ = io.Copy(near, far)
}

// set lets connections through or ends them all.
func (w *wire) set(up bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.up = up
	if !up {
		for c := range w.open {
			_ = c.Close()
		}
	}
}

// cut ends every connection; the node dials again.
func (w *wire) cut() {
	w.set(false)
	w.set(true)
}

// lines publishes the numbers from first to last as events, one message each,
// acknowledged by the node's bus.
func lines(t *testing.T, addr, topic string, first, last int) {
	t.Helper()
	var in bytes.Buffer
	for i := first; i <= last; i++ {
		fmt.Fprintln(&in, i)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "mosquitto_pub", slices.Concat(split(addr), []string{"-V", "5", "-q", "1", "-t", topic, "-l"})...)
	cmd.Stdin = &in
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mosquitto_pub: %v: %s", err, out)
	}
}

type backlog struct {
	Count   int       `json:"count"`
	Bytes   int       `json:"bytes"`
	Oldest  time.Time `json:"oldest"`
	Dropped int       `json:"dropped"`
}

func backlogOf(t *testing.T, e *stack.Edge) (b backlog) {
	t.Helper()
	out, err := fab.Run(t.Context(), "fairlead", "events", "backlog", "--data", e.Dir, "-o", "json")
	if err == nil {
		err = json.Unmarshal(out, &b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Events published during an outage come to the cloud in order and once each,
// though the link is cut and the agent is killed in the middle of the replay.
func TestEvents(t *testing.T) {
	const node = "ev-replay"
	alarms := "fl/" + node + "/event/alarm/pump-1"
	kubectl(t, "create", "namespace", node)
	w := newWire(t)
	cloud := []string{"--cloud", "mqtt://" + w.l.Addr().String()}
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	edge, err := fab.StartEdge(ctx, &stack.Edge{Node: node}, cloud...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		edge.Stop()
		if t.Failed() {
			t.Log(edge.Tail(25))
		}
	})
	// The cloud's subscriber stays, and prints what comes until the last event.
	args := slices.Concat(split(fab.CloudLocal), []string{"-V", "5", "-q", "1", "-t", "fl/" + node + "/event/#", "-F", "%t %p"})
	sub := exec.CommandContext(ctx, "mosquitto_sub", args...)
	var came seen
	sub.Stdout = &came
	if err := sub.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Process.Kill(); _ = sub.Wait() })
	for i := 0; came.count() == 0; i++ { // until the subscription and the link are there
		if i > 100 {
			t.Fatal("nothing comes")
		}
		if err := publish(edge.Bus, alarms, "hello"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	eventually(t, "the link is quiet", func() (string, bool) { return "", came.settled() })
	came.reset()

	w.set(false)
	lines(t, edge.Bus, alarms, 1, 1500)
	if b := backlogOf(t, edge); b.Count != 1500 {
		t.Errorf("the running agent's backlog is %+v, want 1500 events", b)
	}
	edge.Kill()
	if b := backlogOf(t, edge); b.Count != 1500 || b.Bytes < 1500*len(alarms) || b.Oldest.IsZero() || b.Dropped != 0 {
		t.Errorf("the killed agent's backlog is %+v, want 1500 events", b)
	}
	if edge, err = fab.StartEdge(ctx, edge, cloud...); err != nil {
		t.Fatal(err)
	}
	lines(t, edge.Bus, alarms, 1501, 4000)
	w.set(true)
	eventually(t, "the replay", func() (string, bool) { n := came.count(); return strconv.Itoa(n), n > 0 })
	w.cut()
	lines(t, edge.Bus, alarms, 4001, 5000)
	edge.Kill()
	if edge, err = fab.StartEdge(ctx, edge, cloud...); err != nil {
		t.Fatal(err)
	}
	lines(t, edge.Bus, alarms, 5001, 5001)
	eventually(t, "the last event", func() (string, bool) {
		l := came.lines()
		return strconv.Itoa(len(l)), len(l) > 0 && strings.HasSuffix(l[len(l)-1], " 5001")
	})
	for i, l := range came.lines() {
		if want := fmt.Sprintf("%s %d", alarms, i+1); l != want {
			t.Fatalf("message %d is %q, want %q", i+1, l, want)
		}
	}
	edge.Stop()
	if b := backlogOf(t, edge); b.Count != 0 || b.Bytes != 0 {
		t.Errorf("left in the log: %+v", b)
	}
}

// A node that is offline for longer than its log has room for says what is missing.
func TestEventsDropped(t *testing.T) {
	const node = "ev-dropped"
	alarms := "fl/" + node + "/event/alarm"
	kubectl(t, "create", "namespace", node)
	w := newWire(t)
	w.set(false)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	edge, err := fab.StartEdge(ctx, &stack.Edge{Node: node}, "--cloud", "mqtt://"+w.l.Addr().String(), "--event-bytes", "1048576")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(edge.Stop)
	const total = 20000
	lines(t, edge.Bus, alarms, 1, total)
	got := watch(t, fab.CloudLocal, "#")
	eventually(t, "the subscription", func() (string, bool) {
		if err := publish(fab.CloudLocal, "ev-dropped/ready", "1"); err != nil {
			t.Fatal(err)
		}
		return "", len(got.lines) > 0
	})
	w.set(true)
	next, gaps := 1, 0
	got.until(t, "the last event", func(topic string, p []byte) bool {
		if !strings.HasPrefix(topic, "fl/"+node+"/event/") {
			return false
		}
		if topic == "fl/"+node+"/event/gap" {
			var g struct{ From, To, Count, Bytes int }
			if err := json.Unmarshal(p, &g); err != nil || g.From != next || g.Count != g.To-g.From+1 || g.Bytes < 10*g.Count {
				t.Fatalf("after event %d comes the gap %s", next-1, p)
			}
			next = g.To + 1
			gaps++
			return false
		}
		if string(p) != strconv.Itoa(next) {
			t.Fatalf("got %s %s, want event %d", topic, p, next)
		}
		next++
		return next > total
	})
	if gaps == 0 {
		t.Errorf("all %d events were in a log of 1 MiB", total)
	}
}

// seen collects the lines that a program prints.
type seen struct {
	mu   sync.Mutex
	b    bytes.Buffer
	last time.Time
}

func (s *seen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = time.Now()
	return s.b.Write(p)
}

// lines are the complete ones.
func (s *seen) lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := strings.Split(s.b.String(), "\n")
	return out[:len(out)-1]
}

func (s *seen) count() int { return len(s.lines()) }

// settled tells whether nothing came for a second.
func (s *seen) settled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.last) > time.Second
}

// when is when something came last.
func (s *seen) when() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

func (s *seen) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.Reset()
}
