package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// quiet is how long a broker must send nothing more until its retained
// messages count as complete: MQTT has no end of them.
const quiet = 300 * time.Millisecond

// arrival is what a broker sent, or a change of the connection to it.
type arrival struct {
	client.Message
	at time.Time
	// replay: the message was retained before we came.
	replay bool
	// down is why the connection ended, up that there is one again.
	down error
	up   bool
}

// session is one connection to a broker.
type session struct {
	*client.Client
	url  string
	in   chan arrival
	stop func()
}

// connect makes a connection with its subscriptions, or says why there is none.
func (a *app) connect(ctx context.Context, url string, subs ...client.Subscription) (*session, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &session{url: url, in: make(chan arrival, 256)}
	send := func(v arrival) {
		select {
		case s.in <- v:
		case <-ctx.Done():
		}
	}
	first := make(chan struct{})
	failed := make(chan error, 1)
	var once sync.Once
	password, err := a.password()
	if err != nil {
		cancel()
		return nil, err
	}
	s.Client, err = client.New(client.Config{
		URL: url, ClientID: "fairlead-" + random(4), Username: a.user, Password: password,
		KeepAlive: 10 * time.Second, MinBackoff: 200 * time.Millisecond, MaxBackoff: 2 * time.Second,
		Subscriptions: subs,
		OnMessage: func(m client.Message) {
			send(arrival{Message: m, at: a.now(), replay: m.Retain})
		},
		OnUp: func(context.Context) {
			again := true
			once.Do(func() { close(first); again = false })
			if again {
				go send(arrival{up: true, at: a.now()}) // OnUp must not block
			}
		},
		OnDown: func(err error) {
			if ctx.Err() == nil {
				send(arrival{down: err, at: a.now()})
			}
		},
		Logger: slog.New(&firstError{failed: failed}),
	})
	if err != nil {
		cancel()
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Run(ctx) // it gives nil
	}()
	s.stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(2 * time.Second): // a broker that hangs does not hold us
		}
	}
	timer := time.NewTimer(a.timeout)
	defer timer.Stop()
	select {
	case <-first:
		return s, nil
	case err := <-failed:
		s.stop()
		return nil, a.noBroker(url, err)
	case <-timer.C:
		s.stop()
		return nil, fmt.Errorf("no answer from broker %s within %s; is the agent running?", url, a.timeout)
	case <-ctx.Done():
		s.stop()
		return nil, ctx.Err()
	}
}

func (a *app) noBroker(url string, err error) error {
	var refused *client.Refused
	switch {
	case errors.As(err, &refused):
		return fmt.Errorf("broker %s: %w", url, err)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		hint := ""
		if !a.brokerNamed {
			hint = "; name another broker with --broker or " + brokerVariable
		}
		return fmt.Errorf("no broker at %s: %w; is the agent running?%s", url, root(err), hint)
	default:
		return fmt.Errorf("broker %s does not answer: %w; is the agent running?", url, err)
	}
}

// root is the innermost error: "connection refused" says it all.
func root(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

func (a *app) password() (string, error) {
	if a.passwordFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(a.passwordFile)
	if err != nil {
		return "", fmt.Errorf("--password-file: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// firstError is a log handler that keeps the reason why the client could not
// connect: the client itself goes on trying for ever, a command does not.
type firstError struct{ failed chan<- error }

func (h *firstError) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (h *firstError) WithAttrs([]slog.Attr) slog.Handler           { return h }
func (h *firstError) WithGroup(string) slog.Handler                { return h }

func (h *firstError) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(at slog.Attr) bool {
		err, ok := at.Value.Any().(error)
		if ok {
			select {
			case h.failed <- err:
			default:
			}
		}
		return !ok
	})
	return nil
}

// retained is one retained message.
type retained struct {
	payload []byte
	at      time.Time // when it reached us
	replay  bool      // it had been there before we came
}

// state is what a broker holds, as far as it was subscribed to.
type state map[topic.Topic]retained

// put takes a message. A live message does not say whether the broker retained
// it, but the wire contract does for Fairlead's own topics.
func (st state) put(v arrival) {
	if !v.replay {
		p, err := topic.Parse(string(v.Topic))
		if err != nil || !p.Kind.Retained() {
			return
		}
	}
	if len(v.Payload) == 0 {
		delete(st, v.Topic)
		return
	}
	st[v.Topic] = retained{payload: v.Payload, at: v.at, replay: v.replay}
}

// settleState reads until the broker's retained messages are complete.
func (a *app) settleState(ctx context.Context, s *session, st state) error {
	end := time.NewTimer(a.timeout)
	defer end.Stop()
	still := time.NewTimer(quiet)
	defer still.Stop()
	for {
		select {
		case v := <-s.in:
			switch {
			case v.down != nil:
				return fmt.Errorf("broker %s ended the connection: %w", s.url, v.down)
			case v.up:
				continue
			case v.replay:
				still.Reset(quiet)
			}
			st.put(v)
		case <-still.C:
			return nil
		case <-end.C:
			fmt.Fprintf(a.errOut, "fairlead: the broker is still sending after %s: what follows may be incomplete; give it more --timeout\n", a.timeout)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// collect reads what the broker retains below the filters.
func (a *app) collect(ctx context.Context, filters ...topic.Filter) (state, error) {
	s, err := a.connect(ctx, a.broker, subscriptions(filters...)...)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	st := state{}
	return st, a.settleState(ctx, s, st)
}

// subscriptions asks for all retained messages below the filters and for live
// ones; the retain flag then tells the two apart.
func subscriptions(filters ...topic.Filter) []client.Subscription {
	out := make([]client.Subscription, len(filters))
	for i, f := range filters {
		out[i] = client.Subscription{Filter: f, QoS: 1}
	}
	return out
}
