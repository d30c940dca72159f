package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// refuser refuses refuse/#, answering on "refused", and follows copy/x with echo/x.
type refuser struct{}

func (refuser) Intercept(m *broker.Message) ([]broker.Message, error) {
	if rest, ok := strings.CutPrefix(string(m.Topic), "refuse/"); ok {
		return []broker.Message{{Topic: "refused", Payload: []byte(rest), QoS: 1, Retain: true}},
			&broker.Refusal{Code: 0x99, Kind: "test", Reason: "not " + rest}
	}
	if rest, ok := strings.CutPrefix(string(m.Topic), "copy/"); ok {
		return []broker.Message{{Topic: topic.Topic("echo/" + rest), Payload: m.Payload, QoS: 1, Retain: m.Retain}}, nil
	}
	return nil, nil
}

func TestInterceptor(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.Interceptors = []broker.Interceptor{refuser{}} })
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "#", Qos: 1})
	r, _ := connect(t, addr, 5, "x")

	if ack := r.publish("refuse/this", "p", true); ack.ReasonCode != 0x99 || ack.Properties.ReasonString != "not this" {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	if m := sub.next(); m.TopicName != "refused" || string(m.Payload) != "this" {
		t.Errorf("got %+v", m)
	}
	if _, ok := b.Retained("refuse/this"); ok {
		t.Error("a refused message is retained")
	}
	if ack := r.publish("copy/a", "p", true); ack.ReasonCode != 0 {
		t.Errorf("got %+v", ack)
	}
	for _, want := range []string{"copy/a", "echo/a"} { // what was added follows
		if m := sub.next(); m.TopicName != want || string(m.Payload) != "p" {
			t.Errorf("got %+v", m)
		}
		if p, _ := b.Retained(topic.Topic(want)); string(p) != "p" {
			t.Errorf("%s: retained %q", want, p)
		}
	}
	// Messages published together stand and fall together, with what was added to them.
	err := b.Publish(t.Context(),
		broker.Message{Topic: "copy/b", Payload: []byte("p"), Retain: true},
		broker.Message{Topic: "refuse/c", Payload: []byte("p"), Retain: true},
		broker.Message{Topic: "copy/d", Payload: []byte("p"), Retain: true})
	var refusal *broker.Refusal
	if !errors.As(err, &refusal) || refusal.Reason != "not c" {
		t.Errorf("got %v", err)
	}
	for _, gone := range []topic.Topic{"copy/b", "echo/b", "refuse/c", "copy/d", "echo/d"} {
		if p, ok := b.Retained(gone); ok {
			t.Errorf("%s: retained %q", gone, p)
		}
	}
	if p, _ := b.Retained("refused"); string(p) != "c" {
		t.Errorf("the answer is %q", p)
	}
	// Do goes past the interceptors.
	if err := b.Do(t.Context(), func() []broker.Message {
		return []broker.Message{{Topic: "refuse/e", Payload: []byte("p"), Retain: true}}
	}); err != nil {
		t.Error(err)
	}
	if _, ok := b.Retained("refuse/e"); !ok {
		t.Error("Do was intercepted")
	}
}

// The caller's messages stay the caller's.
func TestPublishDoesNotKeepTheSlice(t *testing.T) {
	b, _ := open(t, t.TempDir())
	ms := []broker.Message{{Topic: "a", Payload: []byte("1"), Retain: true}, {Topic: "b", Payload: []byte("2"), Retain: true}}
	if err := b.Publish(t.Context(), ms...); err != nil {
		t.Fatal(err)
	}
	ms[0], ms[1] = broker.Message{}, broker.Message{}
	if p, _ := b.Retained("a"); string(p) != "1" {
		t.Errorf("got %q", p)
	}
	if got := b.RetainedMatch("#"); len(got) != 2 || got[0].Topic != "a" || got[1].Topic != "b" {
		t.Errorf("got %+v", got)
	}
}

func TestWatch(t *testing.T) {
	b, _ := open(t, t.TempDir())
	put := func(tp topic.Topic, p string) {
		t.Helper()
		if err := b.Publish(t.Context(), broker.Message{Topic: tp, Payload: []byte(p), Retain: true}); err != nil {
			t.Fatal(err)
		}
	}
	put("a/1", "old")
	put("b/1", "other")
	var got []string
	stop, err := b.Watch(t.Context(), "a/#", func(m broker.Message) { got = append(got, fmt.Sprintf("%s=%s", m.Topic, m.Payload)) })
	if err != nil {
		t.Fatal(err)
	}
	var second []string
	stop2, err := b.Watch(t.Context(), "#", func(m broker.Message) { second = append(second, string(m.Topic)) })
	if err != nil {
		t.Fatal(err)
	}
	put("a/2", "new")
	put("b/1", "")
	put("a/1", "")
	stop()
	stop()
	put("a/3", "unseen")
	stop2()
	if fmt.Sprint(got) != "[a/1=old a/2=new a/1=]" {
		t.Errorf("got %v", got)
	}
	if fmt.Sprint(second) != "[a/1 b/1 a/2 b/1 a/1 a/3]" {
		t.Errorf("got %v", second)
	}
}

func TestClosed(t *testing.T) {
	b, _ := open(t, t.TempDir())
	stop, err := b.Watch(t.Context(), "#", func(broker.Message) {})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if err := b.Publish(t.Context(), broker.Message{Topic: "a", Payload: []byte("x"), Retain: true}); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("Publish: %v", err)
	}
	if err := b.Do(t.Context(), func() []broker.Message { t.Error("runs"); return nil }); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("Do: %v", err)
	}
	if _, err := b.Watch(t.Context(), "#", func(broker.Message) {}); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("Watch: %v", err)
	}
	if _, err := b.Pipe(); !errors.Is(err, broker.ErrClosed) {
		t.Errorf("Pipe: %v", err)
	}
	for _, addr := range []string{"127.0.0.1:0", "ws://127.0.0.1:0", "unix://" + t.TempDir() + "/s"} {
		if _, err := b.Listen(addr); !errors.Is(err, broker.ErrClosed) {
			t.Errorf("Listen(%s): %v", addr, err)
		}
	}
}

// What was asked for while the broker closes either happened or says so.
func TestPublishDuringClose(t *testing.T) {
	dir := t.TempDir()
	b, _ := open(t, dir)
	type result struct {
		t   topic.Topic
		err error
	}
	results := make(chan result)
	const n = 200
	started := make(chan struct{}, n)
	for i := range n {
		go func() {
			started <- struct{}{}
			err := b.Publish(context.Background(), broker.Message{Topic: topicN(i), Payload: []byte("x"), Retain: true})
			results <- result{topicN(i), err}
		}()
	}
	for range n / 2 {
		<-started
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	after, _ := open(t, dir)
	for range n {
		r := <-results
		_, ok := after.Retained(r.t)
		switch {
		case r.err == nil && !ok:
			t.Errorf("%s was published and is gone", r.t)
		case r.err != nil && !errors.Is(r.err, broker.ErrClosed):
			t.Error(r.err)
		case r.err != nil && ok:
			t.Errorf("%s was refused and is there", r.t)
		}
	}
}

func TestPublishGivesUpWithItsContext(t *testing.T) {
	b, _ := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	in, out := make(chan struct{}), make(chan struct{})
	go func() {
		_ = b.Do(context.Background(), func() []broker.Message { close(in); <-out; return nil })
	}()
	<-in
	cancel()
	if err := b.Publish(ctx, broker.Message{Topic: "a"}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(out)
}

func TestOptions(t *testing.T) {
	if _, err := broker.Open(broker.Options{Dir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "Authenticate") {
		t.Errorf("got %v", err)
	}
}
