package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/stack"
)

// node is the name of every node here.
const node = "bench"

// site is a fairlead-edge with devices and a mapper's credential.
type site struct {
	*running
	metrics string
	token   string
	topics  []string // the devices' properties
}

const properties = 100 // of each device

// seed writes devices into the store of a node that does not run, as if the
// cloud had sent them.
func seed(ctx context.Context, dir string, devices int) (topics []string, err error) {
	b, err := broker.Open(broker.Options{
		Dir: filepath.Join(dir, "store"), Node: node,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, errors.New("nobody") },
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	var props []device.Property
	for i := range properties {
		props = append(props, device.Property{Name: fmt.Sprintf("value%02d", i), Type: device.Float64})
	}
	for i := range devices {
		d := device.Device{
			UID: fmt.Sprintf("uid-%d", i), Rev: 1, Namespace: "default", Name: fmt.Sprintf("device-%d", i), Model: "bench", Protocol: "bench", Properties: props,
		}
		if err := b.Publish(ctx, broker.Message{Topic: topic.DesiredDevice(node, d.Namespace, d.Name), Payload: payload.Encode(d), QoS: 1, Retain: true}); err != nil {
			return nil, err
		}
		for _, p := range props {
			topics = append(topics, string(topic.ReportedTwin(node, d.Namespace, d.Name, p.Name)))
		}
	}
	return topics, nil
}

// startSite starts a node with devices.
func (b *bench) startSite(ctx context.Context, devices int, extra ...string) (*site, error) {
	dir, err := os.MkdirTemp(b.dir, "site-")
	if err != nil {
		return nil, err
	}
	s := &site{running: &running{who: ours, dir: dir}}
	if s.topics, err = seed(ctx, dir, devices); err != nil {
		return nil, fmt.Errorf("seed the store: %w", err)
	}
	var ports [2]int
	for i := range ports {
		if ports[i], err = stack.FreePort(); err != nil {
			return nil, err
		}
	}
	s.addrs = []string{fmt.Sprintf("127.0.0.1:%d", ports[0])}
	s.metrics = fmt.Sprintf("127.0.0.1:%d", ports[1])
	args := append([]string{"run", "--node", node, "--data", dir, "--mqtt", s.addr(), "--metrics", s.metrics, "--log-level", "warn"}, extra...)
	if s.proc, err = b.s.StartProgram(ctx, "fairlead-edge-site", b.edge(), s.addr(), args...); err != nil {
		return nil, err
	}
	t, err := os.ReadFile(filepath.Join(dir, "mapper.token"))
	s.token = strings.TrimSpace(string(t))
	return s, err
}

// mapper makes a publisher of readings that connects as a mapper. Its values
// change with every publish.
func (s *site) mapper(ctx context.Context, n *counters, value func(n int64) string) (*publisher, error) {
	p := &publisher{n: n, window: 256, topics: s.topics, retain: true}
	var buf []byte
	p.payload = func(n int64) []byte {
		buf = fmt.Appendf(buf[:0], `{"v":%s,"t":%d}`, value(n), time.Now().UnixMilli())
		return buf
	}
	return p, p.connect(ctx, s.addr(), connect{id: "bench", user: "mapper:bench", password: s.token})
}
