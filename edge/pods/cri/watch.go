package cri

import (
	"context"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// A request that the watch itself makes is answered at once or not at all.
	watchTimeout = 10 * time.Second
	// retryAfter is the pause before the watch tries again what has just failed.
	retryAfter = 100 * time.Millisecond
	// containerd tells of an exit before its CRI knows, by milliseconds. The watch
	// looks again after settleFirst, then after twice as long and so on, and reports
	// the change after settleLast in any case.
	settleFirst = 5 * time.Millisecond
	settleLast  = 2 * time.Second
)

// change is what a source says of a container or sandbox.
type change struct {
	id   string
	want wanted
}

// wanted is what the CRI must say before the change is reported; a later one
// replaces an earlier one of the same container.
type wanted int

const (
	asIs    wanted = iota // the CRI says it already
	started               // no longer just created
	exited                // not running
	gone                  // unknown
)

// source is a way to hear of changes. subscribe gives a function that blocks for
// the next one.
type source struct {
	name      string
	refusal   time.Duration // how long to wait for the answer that there is no such source
	subscribe func(context.Context, *Client) (func() (change, error), error)
}

var sources = []source{
	{"CRI", 50 * time.Millisecond, criEvents},
	{"containerd", 0, containerdEvents},
}

// Watch calls changed with the ID of each container and sandbox that has started,
// ended or been removed, as soon as the CRI says so, and with "" whenever changes
// may have been missed: once it has connected, when the connection is lost, and when
// it is back. It runs until ctx ends. changed must not block; calls do not overlap.
func (c *Client) Watch(ctx context.Context, changed func(id string)) {
	defer c.eventful.Store(false)
	blind := false
	for ctx.Err() == nil {
		if err := c.awaitRuntime(ctx); err != nil {
			c.log.Debug("the runtime does not answer", "error", err)
			pause(ctx, retryAfter)
			continue
		}
		lost := false
		for _, s := range sources {
			heard, err := c.follow(ctx, s, changed)
			c.eventful.Store(false)
			if ctx.Err() != nil {
				return
			}
			if lost = heard || IsUnavailable(err); lost {
				c.log.Warn("the runtime's events have ended; will subscribe again", "source", s.name, "error", err)
				changed("") // whoever looks learns that the runtime is away
				break
			}
			c.log.Debug("no events of this kind from the runtime", "source", s.name, "error", err)
		}
		if lost {
			blind = false
			pause(ctx, retryAfter)
			continue
		}
		if !blind {
			c.log.Warn("the runtime tells of no changes by itself; it is asked every second")
			blind = true
			changed("")
		}
		// Nothing says when the runtime is replaced by one that does.
		pause(ctx, time.Minute)
	}
}

// Eventful says whether changes are heard of as they happen. Where they are not
// (the runtime is away or has no events) whoever must know has to ask often.
func (c *Client) Eventful() bool { return c.eventful.Load() }

// awaitRuntime waits until the runtime serves.
func (c *Client) awaitRuntime(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := c.rt.Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
	return err
}

// follow reports the changes that a source tells of until it ends. heard says
// whether it has told of any.
func (c *Client) follow(ctx context.Context, s source, changed func(id string)) (heard bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	changes, end := make(chan change), make(chan error, 1)
	read := make(chan struct{})
	defer func() { cancel(); <-read }()
	next, err := s.subscribe(ctx, c)
	if err != nil {
		close(read)
		return false, err
	}
	go func() {
		defer close(read)
		for {
			ch, err := next()
			if err != nil {
				end <- err
				return
			}
			select {
			case changes <- ch:
			case <-ctx.Done():
				return
			}
		}
	}()
	// With an answer to a later request, the subscription has arrived as well: what
	// changes after the look at everything is heard. A refusal comes at once; one
	// that is late costs another look at everything.
	if err := c.ping(ctx); err != nil {
		return false, err
	}
	refusal := time.NewTimer(s.refusal)
	defer refusal.Stop()
	select {
	case err := <-end:
		return false, err
	case <-refusal.C:
	}
	c.log.Info("hears of changes in the runtime", "source", s.name)
	c.eventful.Store(true)
	changed("")

	p := pending{}
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return heard, ctx.Err() // the reader may have ended with a change in its hands
		case err := <-end:
			return heard, err
		case ch := <-changes:
			heard = true
			p.add(ch)
		case <-again.C:
		}
		for _, id := range p.settle(ctx, c) {
			changed(id)
		}
		if at, ok := p.next(); ok {
			again.Reset(time.Until(at))
		}
	}
}

// ping is answered by every runtime that is there.
func (c *Client) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	_, err := c.rt.Version(ctx, &runtimeapi.VersionRequest{})
	return err
}

// pending are changes that the CRI does not show yet, by ID: at most one for each
// container and sandbox of the node.
type pending map[string]*waiting

type waiting struct {
	want     wanted
	at, last time.Time // when to look, and until when
	wait     time.Duration
}

func (p pending) add(ch change) {
	now := time.Now()
	if w := p[ch.id]; w == nil || w.want < ch.want {
		p[ch.id] = &waiting{want: ch.want, at: now, last: now.Add(settleLast), wait: settleFirst}
	}
}

// settle gives the changes that the CRI shows by now, or never will.
func (p pending) settle(ctx context.Context, c *Client) (ids []string) {
	now := time.Now()
	for id, w := range p {
		if w.at.After(now) {
			continue
		}
		if w.want != asIs && now.Before(w.last) && !c.shows(ctx, id, w.want) {
			w.at, w.wait = now.Add(w.wait), 2*w.wait
			continue
		}
		delete(p, id)
		ids = append(ids, id)
	}
	return ids
}

// next is when there is something to look at again.
func (p pending) next() (at time.Time, ok bool) {
	for _, w := range p {
		if !ok || w.at.Before(at) {
			at, ok = w.at, true
		}
	}
	return at, ok
}

// shows says whether the CRI knows of a change.
func (c *Client) shows(ctx context.Context, id string, want wanted) bool {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	s, err := c.ContainerStatus(ctx, id)
	if err == nil {
		switch want {
		case started:
			return s.State != runtimeapi.ContainerState_CONTAINER_CREATED
		case exited:
			return s.State == runtimeapi.ContainerState_CONTAINER_EXITED
		}
		return false
	}
	if !IsNotFound(err) {
		return false
	}
	b, err := c.PodSandboxStatus(ctx, id)
	switch {
	case err == nil && want == started:
		return true
	case err == nil && want == exited:
		return b.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return IsNotFound(err) && want != started
}

// pause waits, at most until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// criEvents are the CRI's own: containerd from 1.7 on, CRI-O where enable_pod_events
// is set.
func criEvents(ctx context.Context, c *Client) (func() (change, error), error) {
	stream, err := c.rt.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		return nil, err
	}
	return func() (change, error) {
		e, err := stream.Recv()
		return change{id: e.GetContainerId()}, err
	}, nil
}
