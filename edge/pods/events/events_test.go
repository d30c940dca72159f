package events

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a Recorder with what it has published.
type recorder struct {
	*Recorder
	mu   sync.Mutex
	sent []Event
	err  error
}

// run runs a recorder inside a synctest bubble.
func run(t *testing.T, change ...func(*Config)) *recorder {
	t.Helper()
	r := &recorder{}
	cfg := Config{Component: "fairlead-edge", Publish: func(e Event) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.err == nil {
			r.sent = append(r.sent, e)
		}
		return r.err
	}}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if r.Recorder, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

// got gives what was published since the last call.
func (r *recorder) got() []Event {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.sent
	r.sent = nil
	return out
}

func (r *recorder) dropped(t *testing.T, cause string) float64 {
	t.Helper()
	var m dto.Metric
	if err := r.Recorder.dropped.WithLabelValues(cause).Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

var pump = Ref{Kind: "Pod", Namespace: "default", Name: "pump", UID: "5b0d1e9c", FieldPath: "spec.containers{app}"}

func TestRepetitionsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		began := time.Now()
		for i := range 3 {
			r.Event(pump, corev1.EventTypeNormal, "Pulled", "here")
			want := Event{ID: fmt.Sprintf("pump.%x", began.UnixNano()), Ref: pump, Reason: "Pulled", Message: "here", Type: "Normal",
				First: began, Last: time.Now(), Count: i + 1, Component: "fairlead-edge"}
			if got := r.got(); len(got) != 1 || got[0] != want {
				t.Errorf("want %+v, got %+v", want, got)
			}
			time.Sleep(time.Minute)
		}
		// Each of these makes another event.
		other := pump
		other.UID = "another"
		sidecar := pump
		sidecar.FieldPath = "spec.initContainers{side}"
		ids := map[string]bool{}
		for _, f := range []func(){
			func() { r.Event(other, corev1.EventTypeNormal, "Pulled", "here") },
			func() { r.Event(sidecar, corev1.EventTypeNormal, "Pulled", "here") },
			func() { r.Event(pump, corev1.EventTypeWarning, "Pulled", "here") },
			func() { r.Event(pump, corev1.EventTypeNormal, "Created", "here") },
			func() { r.Eventf(pump, corev1.EventTypeNormal, "Pulled", "%s", "there") },
		} {
			f()
			got := r.got()
			if len(got) != 1 || got[0].Count != 1 || ids[got[0].ID] {
				t.Fatalf("got %+v", got)
			}
			ids[got[0].ID] = true
		}
	})
}

func TestSimilarEventsAreCombined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		say := func(i int) Event {
			t.Helper()
			ref := pump
			ref.FieldPath = fmt.Sprintf("spec.containers{%d}", i%2) // is not looked at
			r.Eventf(ref, corev1.EventTypeWarning, "Unhealthy", "try %d", i)
			got := r.got()
			if len(got) != 1 {
				t.Fatalf("got %+v", got)
			}
			time.Sleep(time.Second)
			return got[0]
		}
		for i := range 9 {
			if e := say(i); e.Message != fmt.Sprintf("try %d", i) || e.Count != 1 {
				t.Errorf("got %+v", e)
			}
		}
		first := say(9)
		if first.Message != "(combined from similar events): try 9" || first.Count != 1 {
			t.Errorf("got %+v", first)
		}
		second := say(10)
		if second.ID != first.ID || second.Message != "(combined from similar events): try 10" || second.Count != 2 || !second.First.Equal(first.First) {
			t.Errorf("got %+v after %+v", second, first)
		}
		// Another reason is not similar, and ten minutes of silence end it.
		r.Event(pump, corev1.EventTypeWarning, "Failed", "try 11")
		if got := r.got(); len(got) != 1 || got[0].Message != "try 11" {
			t.Errorf("got %+v", got)
		}
		time.Sleep(10*time.Minute - time.Second)
		if e := say(12); !strings.HasPrefix(e.Message, combinedPrefix) {
			t.Errorf("combining ended after less than ten minutes: %+v", e)
		}
		time.Sleep(10 * time.Minute)
		if e := say(13); e.Message != "try 13" {
			t.Errorf("got %+v", e)
		}
	})
}

func TestSpam(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t)
		say := func(ref Ref, typ string) int {
			r.Event(ref, typ, "BackOff", "again")
			got := r.got()
			if len(got) == 0 {
				return 0
			}
			return got[0].Count
		}
		for i := range 25 {
			if n := say(pump, corev1.EventTypeWarning); n != i+1 {
				t.Fatalf("want the count %d, got %d", i+1, n)
			}
		}
		for range 10 {
			if n := say(pump, corev1.EventTypeWarning); n != 0 {
				t.Fatal("more than 25 at once")
			}
		}
		// What was not said is counted.
		if n := r.dropped(t, "spam"); n != 10 {
			t.Errorf("dropped %v, want 10", n)
		}
		other := pump
		other.Name = "valve"
		if say(other, corev1.EventTypeWarning) != 1 || say(pump, corev1.EventTypeNormal) != 1 {
			t.Error("another object, or type, is slowed down too")
		}
		time.Sleep(5*time.Minute - time.Second)
		if say(pump, corev1.EventTypeWarning) != 0 {
			t.Error("a token came before five minutes")
		}
		time.Sleep(time.Second)
		if n := say(pump, corev1.EventTypeWarning); n != 37 {
			t.Errorf("want the count 37, got %d", n)
		}
		if say(pump, corev1.EventTypeWarning) != 0 {
			t.Error("two tokens in five minutes")
		}
		time.Sleep(24 * time.Hour)
		for i := range 26 {
			if said := say(pump, corev1.EventTypeWarning) > 0; said != (i < 25) {
				t.Fatalf("event %d after a day: said: %v", i+1, said)
			}
		}
	})
}

// blocked makes Publish wait.
func blocked(gate chan struct{}) func(*Config) {
	return func(c *Config) {
		publish := c.Publish
		c.Publish = func(e Event) error { <-gate; return publish(e) }
		c.Queue = 3
	}
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		r := run(t, blocked(gate))
		r.Event(pump, corev1.EventTypeNormal, "Pulling", "in the hands of Publish")
		synctest.Wait()
		for i := range 5 {
			r.Eventf(pump, corev1.EventTypeNormal, "Pulling", "%d", i)
		}
		r.Event(pump, corev1.EventTypeNormal, "Pulling", "1") // takes no more room
		if n := r.dropped(t, "full"); n != 2 {
			t.Errorf("dropped %v, want 2", n)
		}
		close(gate)
		var got []string
		for _, e := range r.got() {
			got = append(got, fmt.Sprintf("%s×%d", e.Message, e.Count))
		}
		if want := []string{"in the hands of Publish×1", "0×1", "1×2", "2×1"}; !slices.Equal(got, want) {
			t.Errorf("want %q, got %q", want, got)
		}
	})
}

func TestWhatWaitsAtTheEndIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent []string
		r, err := New(Config{Component: "fairlead-edge", Publish: func(e Event) error { sent = append(sent, e.Message); return nil }})
		if err != nil {
			t.Fatal(err)
		}
		r.Event(pump, corev1.EventTypeNormal, "Killing", "one")
		r.Event(pump, corev1.EventTypeNormal, "Killing", "two")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r.Run(ctx)
		if !slices.Equal(sent, []string{"one", "two"}) {
			t.Errorf("got %q", sent)
		}
	})
}

func TestARefusedEventIsCountedAndToldWithTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := run(t, func(c *Config) { c.Metrics = prometheus.NewRegistry() })
		r.mu.Lock()
		r.err = errors.New("no space left on device")
		r.mu.Unlock()
		r.Event(pump, corev1.EventTypeWarning, "Failed", "x")
		r.got()
		if n := r.dropped(t, "refused"); n != 1 {
			t.Errorf("dropped %v, want 1", n)
		}
		r.mu.Lock()
		r.err = nil
		r.mu.Unlock()
		r.Event(pump, corev1.EventTypeWarning, "Failed", "x")
		if got := r.got(); len(got) != 1 || got[0].Count != 2 {
			t.Errorf("got %+v", got)
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	c := newCorrelator()
	now := time.UnixMilli(1790000000000)
	ids := map[string]bool{}
	for i := range 3 * records {
		ref := pump
		ref.Name = fmt.Sprintf("pod-%d", i)
		e, ok := c.correlate(Event{Ref: ref, Type: "Normal", Reason: "Pulled", Message: "here"}, now)
		if !ok || ids[e.ID] {
			t.Fatalf("%d: got %+v, %v", i, e, ok)
		}
		ids[e.ID] = true
	}
	if a, b, d := c.similar.Len(), c.seen.Len(), c.buckets.Len(); a != records || b != records || d != records {
		t.Errorf("%d, %d, %d records, want %d each", a, b, d, records)
	}
}

func TestTheMessagesOfSimilarEventsAreBounded(t *testing.T) {
	c := newCorrelator()
	for i := range 100 {
		c.correlate(Event{Ref: pump, Type: "Warning", Reason: "Unhealthy", Message: fmt.Sprint(i)}, time.UnixMilli(1790000000000))
	}
	s, ok := get[*similarities](c.similar, similarKey{spamKey{Ref{Kind: "Pod", Namespace: "default", Name: "pump", UID: pump.UID}, "Warning"}, "Unhealthy"})
	if !ok || len(s.messages) != combineFrom-1 {
		t.Errorf("%+v", s)
	}
}

func TestIDs(t *testing.T) {
	c := newCorrelator()
	now := time.Unix(0, 0x178959f726d80ec)
	long := strings.Repeat("x", 235) + "-." + strings.Repeat("x", 17) // cut between x and -
	for _, test := range []struct{ name, want string }{
		{"test-pod", "test-pod.178959f726d80ec"},
		{"test-pod", "test-pod.178959f726d80ed"}, // never twice
		{long, strings.Repeat("x", 235) + ".178959f726d80ee"},
	} {
		got := c.id(test.name, now)
		if got != test.want || len(got) > maxName {
			t.Errorf("want %q, got %q (%d)", test.want, got, len(got))
		}
	}
}
