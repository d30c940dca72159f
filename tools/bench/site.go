package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testslave"
)

const (
	node         = "bench-1"
	pollInterval = 100 * time.Millisecond
)

func stackPort() (int, error) { return stack.FreePort() }

// site is a node with one device, behind a proxy that counts.
type site struct {
	slave *testslave.Slave
	proxy *proxy
}

const deviceYAML = `
apiVersion: fairlead.dev/v1alpha1
kind: DeviceModel
metadata: {name: bench, namespace: default}
spec:
  protocol: modbus
  properties:
  - {name: level, type: uint16, pollInterval: %s, modbus: {table: inputRegister, address: 0}}
  - {name: speed, type: uint16, access: rw, min: 0, max: 60000, pollInterval: %s, modbus: {table: holdingRegister, address: 20}}
---
apiVersion: fairlead.dev/v1alpha1
kind: Device
metadata: {name: bench, namespace: default}
spec:
  nodeName: %s
  model: bench
  modbus: {address: "%s", unit: 1}
`

func (b *bench) site(ctx context.Context) (*site, error) {
	st := &site{}
	var err error
	if st.slave, err = testslave.New(); err != nil {
		return nil, err
	}
	if err := b.s.StartCluster(ctx); err != nil {
		return nil, err
	}
	if err := b.s.StartCloud(ctx); err != nil {
		return nil, err
	}
	if st.proxy, err = newProxy(b.s.CloudMQTT); err != nil {
		return nil, err
	}
	if b.edge, err = b.s.StartEdge(ctx, &stack.Edge{Node: node}, "--cloud", "mqtt://"+st.proxy.addr()); err != nil {
		return nil, err
	}
	if _, err := b.s.StartMapper(ctx, b.edge); err != nil {
		return nil, err
	}
	yaml := fmt.Sprintf(deviceYAML, pollInterval, pollInterval, node, st.slave.Addr)
	if _, err := b.s.KubectlIn(ctx, []byte(yaml), "apply", "-f", "-"); err != nil {
		return nil, err
	}
	// Both sides are in step once the cloud has the first reading.
	return st, b.follow(ctx, "level", func(f *follower) error {
		_, err := f.until(ctx, func(r payload.Reading) bool { return r.Good() })
		return err
	})
}

// follower sees a property's readings on the cloud broker as they come.
type follower struct{ got chan reading }

type reading struct {
	payload.Reading
	at time.Time
}

func (b *bench) follow(ctx context.Context, property string, fn func(*follower) error) error {
	f := &follower{got: make(chan reading, 10000)}
	cfg := client.Config{
		URL: b.s.CloudLocal, ClientID: "follow",
		Subscriptions: []client.Subscription{{Filter: topic.Filter(topic.ReportedTwin(node, "default", "bench", property)), QoS: 1}},
		OnMessage: func(m client.Message) {
			r := reading{at: time.Now()}
			if json.Unmarshal(m.Payload, &r.Reading) == nil {
				f.got <- r
			}
		},
	}
	return withClient(ctx, cfg, func(*client.Client) error { return fn(f) })
}

func (f *follower) until(ctx context.Context, ok func(payload.Reading) bool) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		select {
		case r := <-f.got:
			if ok(r.Reading) {
				return r.at, nil
			}
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("the expected reading did not come: %w", ctx.Err())
		}
	}
}

func (b *bench) latency(ctx context.Context, st *site) error {
	say("%d patches of a desired value, and %d changes of a register", b.n, b.n)
	cfg, err := clientcmd.BuildConfigFromFlags("", b.s.Kubeconfig)
	if err != nil {
		return err
	}
	cfg.QPS = -1
	kube, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return err
	}
	devices := kube.Resource(schema.GroupVersionResource{Group: "fairlead.dev", Version: "v1alpha1", Resource: "devices"}).Namespace("default")
	var sent, accepted []time.Duration
	for i := range b.n + 5 {
		v := uint16(1000 + i)
		writes := st.slave.Writes("holding", 20)
		patch := fmt.Sprintf(`{"spec":{"desired":{"speed":%d}}}`, v)
		began := time.Now()
		if _, err := devices.Patch(ctx, "bench", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return err
		}
		done := time.Now()
		for st.slave.Writes("holding", 20) == writes {
			if time.Since(began) > 10*time.Second {
				return fmt.Errorf("register not written after patch %d", i)
			}
			time.Sleep(2 * time.Millisecond)
		}
		at := st.slave.When("holding", 20)
		if i >= 5 { // the first ones open connections
			sent = append(sent, at.Sub(began))
			accepted = append(accepted, max(0, at.Sub(done)))
		}
		pause(ctx, 20*time.Millisecond)
	}
	b.r.add("kubectl patch → register written, p50", quantile(sent, 0.5), 15, "ms", "from sending the PATCH; from its answer %.1f ms", quantile(accepted, 0.5))
	b.r.add("kubectl patch → register written, p99", quantile(sent, 0.99), 50, "ms", "n=%d; from its answer %.1f ms", len(sent), quantile(accepted, 0.99))

	var up []time.Duration
	err = b.follow(ctx, "level", func(f *follower) error {
		for i := range b.n {
			v := fmt.Sprint(2000 + i)
			// Not in step with the poll.
			pause(ctx, pollInterval/2+time.Duration(i*7%int(pollInterval/time.Millisecond))*time.Millisecond)
			began := time.Now()
			st.slave.Set("input", 0, uint16(2000+i))
			at, err := f.until(ctx, func(r payload.Reading) bool { return string(r.V) == v })
			if err != nil {
				return err
			}
			up = append(up, at.Sub(began))
		}
		return nil
	})
	if err != nil {
		return err
	}
	poll := float64(pollInterval.Milliseconds())
	b.r.add("register change → cloud broker, p50", quantile(up, 0.5), poll+10, "ms", "poll interval %.0f ms included; p99 %.1f ms, n=%d", poll, quantile(up, 0.99), len(up))
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (b *bench) memory(ctx context.Context, bin string) error {
	const rest = 60 * time.Second
	say("memory and CPU of the idle agent, one device, after %s", rest)
	cpu0, err := machine.CPUOf(b.edge.PID())
	if err != nil {
		return err
	}
	began := time.Now()
	pause(ctx, rest)
	cpu1, err := machine.CPUOf(b.edge.PID())
	if err != nil {
		return err
	}
	m, err := machine.MemoryOf(b.edge.PID())
	if err != nil {
		return err
	}
	b.r.add("fairlead-edge idle, PSS", m.PSS/1024, 40, "MB", "RSS %.1f MB", m.RSS/1024)
	b.r.add("fairlead-edge idle, anonymous", m.Anon/1024, 12, "MB", "")
	b.r.add("fairlead-edge idle, CPU", 100*(cpu1-cpu0)/time.Since(began).Seconds(), 0, "%", "of a core, a mapper polling every %s on its bus", pollInterval)
	size, err := fileSize(filepath.Join(bin, "fairlead-edge"))
	if err != nil {
		return err
	}
	b.r.add("fairlead-edge binary", size/(1<<20), 40, "MB", "static, stripped")
	for name, p := range map[string]*stack.Process{"fairlead-cloud": b.s.Cloud} {
		m, err := machine.MemoryOf(p.PID())
		if err != nil {
			return err
		}
		b.r.add(name+" idle, PSS", m.PSS/1024, 0, "MB", "anonymous %.1f MB", m.Anon/1024)
	}
	return nil
}
