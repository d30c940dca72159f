package edge

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

const (
	plant = "plant-7"
	uid   = "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
)

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// agent is a running agent.
type agent struct {
	t     *testing.T
	addrs []string
	log   *lines
	stop  func() // ends it and checks that it ended well
}

func config(dir string) Config {
	return Config{Node: plant, Dir: dir, MQTT: []string{"127.0.0.1:0"}, Version: "v0.1.0"}
}

// start runs an agent until the test ends or stop is called.
func start(t *testing.T, cfg Config) *agent {
	t.Helper()
	a := &agent{t: t, log: &lines{}}
	cfg.Logger = slog.New(slog.NewTextHandler(a.log, nil))
	ready := make(chan []string, 1)
	cfg.Ready = func(addrs []string) { ready <- addrs }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	select {
	case a.addrs = <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("the agent ended with %v\n%s", err, a.log)
	case <-time.After(patience):
		cancel()
		t.Fatal("the agent does not serve")
	}
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		if t.Failed() {
			t.Log(a.log)
		}
	})
	t.Cleanup(a.stop)
	return a
}

// fails runs an agent that must not come up, and gives its error.
func fails(t *testing.T, cfg Config) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cfg.Ready = func([]string) { t.Error("the agent came up"); cancel() }
	err := Run(ctx, cfg)
	if err == nil {
		t.Fatal("want an error")
	}
	return err.Error()
}

func wantWords(t *testing.T, got string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(got, w) {
			t.Errorf("want %q in %q", w, got)
		}
	}
}

// seed writes retained topics into a data folder, as an agent before left them.
func seed(t *testing.T, dir string, state map[topic.Topic]string) {
	t.Helper()
	b, err := broker.Open(broker.Options{
		Dir: filepath.Join(dir, "store"), Node: plant,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	for x, p := range state {
		if err := b.Publish(t.Context(), broker.Message{Topic: x, Payload: []byte(p), QoS: 1, Retain: true}); err != nil {
			t.Error(err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// peer is a client of the agent's bus.
type peer struct {
	*client.Client
	t   *testing.T
	log lines

	mu   sync.Mutex
	seen map[topic.Topic]string
	up   chan struct{}
}

// dial begins to connect as a client that sees everything below fl/.
func dial(t *testing.T, addr, user, password string) *peer {
	t.Helper()
	p := &peer{t: t, seen: map[topic.Topic]string{}, up: make(chan struct{})}
	var once sync.Once
	var err error
	p.Client, err = client.New(client.Config{
		URL: addr, ClientID: "red", Username: user, Password: password,
		Subscriptions: []client.Subscription{{Filter: "fl/#", QoS: 1}},
		OnMessage: func(m client.Message) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(m.Payload) == 0 {
				delete(p.seen, m.Topic)
				return
			}
			p.seen[m.Topic] = string(m.Payload)
		},
		OnUp:   func(context.Context) { once.Do(func() { close(p.up) }) },
		Logger: slog.New(slog.NewTextHandler(&p.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return p
}

// connected waits until the client is up.
func (p *peer) connected() *peer {
	p.t.Helper()
	select {
	case <-p.up:
	case <-time.After(patience):
		p.t.Fatalf("the client does not connect:\n%s", p.log.String())
	}
	return p
}

// refused waits until the bus has said no, and why.
func (p *peer) refused(words ...string) {
	p.t.Helper()
	eventually(p.t, "the client is refused", func() bool { return strings.Contains(p.log.String(), "the broker refused") })
	wantWords(p.t, p.log.String(), words...)
	select {
	case <-p.up:
		p.t.Error("the client connected")
	default:
	}
}

func (p *peer) has(x topic.Topic, words ...string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	got, ok := p.seen[x]
	if !ok {
		return false
	}
	for _, w := range words {
		if !strings.Contains(got, w) {
			return false
		}
	}
	return true
}
