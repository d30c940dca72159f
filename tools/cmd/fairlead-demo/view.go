package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// view holds what both brokers retain of the node, as an ordinary client sees it.
type view struct {
	edge, cloud side
	cancel      context.CancelFunc
	wg          sync.WaitGroup
}

// side is one broker.
type side struct {
	url string

	mu struct {
		sync.Mutex
		up     bool
		topics map[topic.Topic][]byte
		sets   [2]*digest.Set // by direction
	}
}

func newView(edge, cloud string) *view {
	v := &view{cancel: func() {}}
	v.edge.url, v.cloud.url = "mqtt://"+edge, "mqtt://"+cloud
	v.edge.forget(false)
	v.cloud.forget(false)
	return v
}

// forget drops what was known: a new connection begins with what is retained.
func (s *side) forget(up bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.up = up
	s.mu.topics = map[topic.Topic][]byte{}
	s.mu.sets = [2]*digest.Set{digest.NewSet(), digest.NewSet()}
}

func (s *side) put(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil || !p.Kind.Retained() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d, ok := p.Direction(); ok {
		s.mu.sets[d].Put(string(m.Topic), m.Payload)
	}
	if len(m.Payload) == 0 {
		delete(s.mu.topics, m.Topic)
	} else {
		s.mu.topics[m.Topic] = m.Payload
	}
}

// get decodes what a topic holds; false where there is nothing readable.
func (s *side) get(t topic.Topic, into any) bool {
	s.mu.Lock()
	b, ok := s.mu.topics[t]
	s.mu.Unlock()
	return ok && payload.Decode(b, into) == nil
}

func (s *side) sums() (up bool, sums [2]digest.Hash, counts [2]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, set := range s.mu.sets {
		sums[i], counts[i] = set.Sum(), set.Count()
	}
	return s.mu.up, sums, counts
}

func (v *view) start(ctx context.Context) {
	ctx, v.cancel = context.WithCancel(ctx)
	for _, s := range []*side{&v.edge, &v.cloud} {
		c, err := client.New(client.Config{
			URL: s.url, ClientID: "fairlead-demo", KeepAlive: 5 * time.Second,
			MinBackoff: 200 * time.Millisecond, MaxBackoff: time.Second,
			Subscriptions: []client.Subscription{{Filter: topic.NodeAll(edgeNode), QoS: 1}},
			OnMessage:     s.put,
			OnUp: func(context.Context) {
				s.mu.Lock()
				s.mu.up = true
				s.mu.Unlock()
			},
			OnDown: func(error) { s.forget(false) },
		})
		if err != nil {
			continue // the addresses are our own
		}
		v.wg.Go(func() { _ = c.Run(ctx) }) // it gives nil
	}
}

func (v *view) stop() {
	v.cancel()
	v.wg.Wait()
}

func (v *view) reading(property string) (r payload.Reading, ok bool) {
	return r, v.edge.get(topic.ReportedTwin(edgeNode, "default", pump, property), &r)
}

// wait waits until the device is online and both sides are the same.
func (v *view) wait(ctx context.Context, limit time.Duration) error {
	var s payload.DeviceStatus
	err := until(ctx, limit, func() bool {
		_, value := v.reading("pressure")
		return value && v.edge.get(topic.ReportedDevice(edgeNode, "default", pump), &s) && s.State == payload.DeviceOnline
	})
	if errors.Is(err, errLate) {
		return fmt.Errorf("device %s is not online after %s: its state is %q %s", pump, limit, s.State, s.Error)
	}
	if err != nil {
		return err
	}
	return v.agree(ctx, limit)
}

// agree waits until the link is up and both sides hold the same.
func (v *view) agree(ctx context.Context, limit time.Duration) error {
	err := until(ctx, limit, func() bool {
		var l payload.Link
		_, same := v.same()
		return same && v.cloud.get(topic.ReportedLink(edgeNode), &l) && l.Online
	})
	if errors.Is(err, errLate) {
		return fmt.Errorf("the cloud and the edge do not agree after %s", limit)
	}
	return err
}

var errLate = errors.New("not in time")

// until asks again and again.
func until(ctx context.Context, limit time.Duration, ok func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(limit)
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end:
			return errLate
		case <-tick.C:
		}
	}
	return nil
}

// same compares the node's state on both brokers. known is false while one of
// them is not there.
func (v *view) same() (known, same bool) {
	eu, e, _ := v.edge.sums()
	cu, c, _ := v.cloud.sums()
	return eu && cu, eu && cu && e == c
}

// words describe the fabric, for the status line.
func (v *view) words() []string {
	var out []string
	var l payload.Link
	if v.edge.get(topic.ReportedLink(edgeNode), &l) {
		out = append(out, map[bool]string{true: "link up", false: "link down"}[l.Online])
	}
	if known, _ := v.same(); known {
		// A value that is on its way is no difference to speak of.
		word := "repairing"
		for range 20 {
			if _, same := v.same(); same {
				_, _, n := v.edge.sums()
				word = fmt.Sprintf("in sync %d↓ %d↑", n[topic.Desired], n[topic.Reported])
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		out = append(out, word)
	}
	var s payload.DeviceStatus
	if !v.edge.get(topic.ReportedDevice(edgeNode, "default", pump), &s) {
		return out
	}
	out = append(out, pump+" "+s.State)
	if r, ok := v.reading("pressure"); ok {
		out = append(out, value(r, "bar", 2))
	}
	if r, ok := v.reading("speed"); ok {
		word := value(r, "%", 1)
		var t payload.Target
		if v.edge.get(topic.ReportedTarget(edgeNode, "default", pump, "speedSetpoint"), &t) {
			word += " → " + string(t.V) + " by " + t.By
		}
		out = append(out, word)
	}
	return out
}

// value is a number as a person reads it, with its last good value where it is bad.
func value(r payload.Reading, unit string, decimals int) string {
	v, suffix := r.V, ""
	if !r.Good() {
		v, suffix = r.LV, " "+r.Q
	}
	var f float64
	if json.Unmarshal(v, &f) != nil {
		return strings.TrimSpace("-" + suffix)
	}
	return fmt.Sprintf("%.*f %s%s", decimals, f, unit, suffix)
}
