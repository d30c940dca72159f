package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// open starts a broker on dir whose clients get the role of their user name.
func open(t *testing.T, dir string, change ...func(*broker.Options)) (*broker.Broker, string) {
	t.Helper()
	o := broker.Options{
		Dir: dir, Node: "plant-7", Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username == "mapper" {
				return access.Identity{Role: access.Mapper, Name: "modbus"}, nil
			}
			return access.Identity{Role: access.Local}, nil
		},
	}
	if os.Getenv(child) != "" {
		o.Logger = nil // a failed store's goroutines outlive the test
	}
	for _, c := range change {
		c(&o)
	}
	b, err := broker.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	addr, err := b.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return b, addr
}

// dial connects a client and waits until it is up. Its messages arrive on the channel.
func dial(t *testing.T, addr, user string, subs ...client.Subscription) (*client.Client, <-chan client.Message) {
	t.Helper()
	msgs := make(chan client.Message, 1000)
	up := make(chan struct{})
	var once sync.Once
	c, err := client.New(client.Config{
		URL: addr, ClientID: t.Name() + user, Username: user, Subscriptions: subs,
		OnMessage: func(m client.Message) { msgs <- m },
		OnUp:      func(context.Context) { once.Do(func() { close(up) }) },
		Logger:    slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-up:
	case <-time.After(10 * time.Second):
		t.Fatal("client did not connect")
	}
	return c, msgs
}

func next(t *testing.T, msgs <-chan client.Message) client.Message {
	t.Helper()
	select {
	case m := <-msgs:
		return m
	case <-time.After(10 * time.Second):
		t.Fatal("no message")
		return client.Message{}
	}
}

// A retained message that was acknowledged is there after a restart, and
// reaches a new subscriber.
func TestRetainedSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir)
	c, _ := dial(t, addr, "")
	if err := c.Publish(t.Context(), client.Message{Topic: "site/name", Payload: []byte("north"), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, addr = open(t, dir)
	_, msgs := dial(t, addr, "reader", client.Subscription{Filter: "#", QoS: 1})
	m := next(t, msgs)
	if m.Topic != "site/name" || string(m.Payload) != "north" || !m.Retain {
		t.Fatalf("got %+v", m)
	}
}

// All retained messages reach a wildcard subscriber, far beyond mochi's queue.
func TestReplayIsComplete(t *testing.T) {
	b, addr := open(t, t.TempDir())
	const n = 20000
	var msgs []broker.Message
	for i := range n {
		msgs = append(msgs, broker.Message{Topic: topic.Topic("u/" + time.Unix(int64(i), 0).UTC().Format("150405") + "/" + string(rune('a'+i%7))), Payload: []byte("x"), QoS: 1, Retain: true})
	}
	if err := b.Publish(t.Context(), msgs...); err != nil {
		t.Fatal(err)
	}
	_, got := dial(t, addr, "reader", client.Subscription{Filter: "u/#", QoS: 1})
	seen := map[topic.Topic]bool{}
	for len(seen) < n {
		seen[next(t, got).Topic] = true
	}
}

func TestOneWriterPerTopic(t *testing.T) {
	_, addr := open(t, t.TempDir())
	local, _ := dial(t, addr, "")
	err := local.Publish(t.Context(), client.Message{Topic: topic.ReportedTwin("plant-7", "default", "pump", "p"), Payload: []byte(`{"v":1,"t":1}`), QoS: 1, Retain: true})
	var r *client.Refused
	if !asRefused(err, &r) || r.Code != broker.CodeNotAuthorized || r.Reason == "" {
		t.Fatalf("got %v", err)
	}
	mapper, _ := dial(t, addr, "mapper")
	if err := mapper.Publish(t.Context(), client.Message{Topic: topic.ReportedTwin("plant-7", "default", "pump", "p"), Payload: []byte(`{"v":1,"t":1}`), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
}

func asRefused(err error, r **client.Refused) bool { return errors.As(err, r) }
