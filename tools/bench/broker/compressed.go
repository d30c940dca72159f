package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// wire stands between the node and the cloud and counts what TCP carries.
type wire struct {
	l        net.Listener
	to       string
	up, down atomic.Int64
	wg       sync.WaitGroup
}

func newWire(to string) (*wire, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &wire{l: l, to: to}
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.carry(c) })
		}
	})
	return w, nil
}

func (w *wire) carry(near net.Conn) {
	defer func() { _ = near.Close() }()
	far, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	w.wg.Go(func() {
		_, _ = io.Copy(io.MultiWriter(far, tally{&w.up}), near)
		_ = far.Close()
	})
	_, _ = io.Copy(io.MultiWriter(near, tally{&w.down}), far)
}

type tally struct{ n *atomic.Int64 }

func (t tally) Write(b []byte) (int, error) { t.n.Add(int64(len(b))); return len(b), nil }

// selfSigned makes a certificate for 127.0.0.1 and the file that trusts it.
func selfSigned(dir string) (cert tls.Certificate, file string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, "", err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return cert, "", err
	}
	file = filepath.Join(dir, "ca.pem")
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
}

// compressedFigure is what the link carries while devices change, in the clear
// without compression, and with it in a WebSocket and in TLS. The devices are
// polled in turn, each once a second; a tenth of the properties of each have
// changed then, and walk at random.
func (b *bench) compressedFigure(ctx context.Context) error {
	const devices, rate = 50, 500
	cert, ca, err := selfSigned(b.dir)
	if err != nil {
		return err
	}
	for _, x := range []struct {
		name, listen string
		bound        *bound
	}{
		{"link, 500 changes/s, mqtt, not compressed", "mqtt://127.0.0.1:0", nil},
		{"link, 500 changes/s, ws, compressed", "ws://127.0.0.1:0/mqtt", atMost(10)},
		{"link, 500 changes/s, mqtts, compressed", "mqtts://127.0.0.1:0", atMost(10)},
	} {
		if err := b.linkCarries(ctx, x.name, x.listen, x.bound, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, ca, devices, rate); err != nil {
			return fmt.Errorf("%s: %w", x.listen, err)
		}
	}
	return nil
}

func (b *bench) linkCarries(ctx context.Context, name, listen string, bound *bound, cert *tls.Config, ca string, devices, rate int) (err error) {
	dir, err := os.MkdirTemp(b.dir, "cloud-")
	if err != nil {
		return err
	}
	cloud, err := broker.Open(broker.Options{
		Dir: dir, Durability: broker.CloudDurability, TLS: cert,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			switch {
			case ci.Listener == broker.InProcess:
				return access.Identity{Role: access.Cloud}, nil
			case ci.Username == node:
				return access.Identity{Role: access.Node, Name: node}, nil
			}
			return access.Identity{}, errors.New("unknown node")
		},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cloud.Close()) }()
	at, err := cloud.Listen(listen)
	if err != nil {
		return err
	}
	scheme, rest, _ := strings.Cut(at, "://")
	host, path, _ := strings.Cut(rest, "/")
	w, err := newWire(host)
	if err != nil {
		return err
	}
	defer func() { _ = w.l.Close(); w.wg.Wait() }()
	url := scheme + "://" + w.l.Addr().String()
	if path != "" {
		url += "/" + path
	}
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("a-token-for-the-bench-node-0123456789\n"), 0o600); err != nil {
		return err
	}
	s, err := b.startSite(ctx, devices, "--cloud", url, "--cloud-ca", ca, "--token-file", token)
	if err != nil {
		return err
	}
	defer s.stop()

	// What reaches the cloud, and how old it is then.
	var mu sync.Mutex
	var ages []uint32
	arrived := 0
	cctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer func() { cancel(); running.Wait() }()
	sub, err := client.New(client.Config{
		Dial: func(context.Context) (net.Conn, error) { return cloud.Pipe() }, ClientID: "bench-cloud",
		Subscriptions: []client.Subscription{{Filter: topic.Filter("fl/" + node + "/reported/twin/#"), QoS: 1}},
		OnMessage: func(m client.Message) {
			var r payload.Reading
			if json.Unmarshal(m.Payload, &r) != nil {
				return
			}
			mu.Lock()
			arrived++
			ages = append(ages, uint32(max(0, time.Now().UnixMilli()-r.T)))
			mu.Unlock()
		},
	})
	if err != nil {
		return err
	}
	running.Go(func() { _ = sub.Run(cctx) })
	up := make(chan struct{}, 1)
	mapper, err := client.New(client.Config{
		URL: "mqtt://" + s.addr(), ClientID: "bench-mapper", Username: "mapper:bench", Password: s.token,
		OnUp: func(context.Context) { up <- struct{}{} },
	})
	if err != nil {
		return err
	}
	running.Go(func() { _ = mapper.Run(cctx) })
	select {
	case <-up:
	case <-time.After(30 * time.Second):
		return errors.New("the mapper did not get through")
	}
	failed := make(chan error, 1)
	running.Go(func() { failed <- change(cctx, mapper, s.topics, devices, rate) })

	say("%s: %s", name, b.measure*4)
	pause(ctx, 12*time.Second) // the window is full, digests come every ten seconds
	mu.Lock()
	arrived, ages = 0, nil
	mu.Unlock()
	u0, d0, began := w.up.Load(), w.down.Load(), time.Now()
	cpu0, err := machine.CPUOf(s.proc.PID())
	if err != nil {
		return err
	}
	select {
	case err := <-failed:
		return fmt.Errorf("the mapper ended: %w", err)
	case <-time.After(b.measure * 4):
	case <-ctx.Done():
		return ctx.Err()
	}
	took := time.Since(began).Seconds()
	u1, d1 := w.up.Load(), w.down.Load()
	cpu1, err := machine.CPUOf(s.proc.PID())
	if err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	got := float64(arrived) / took
	f := figure{
		Name: name, Unit: "kB/s", Ours: []float64{float64(u1-u0+d1-d0) / took / 1000}, Bound: bound,
		Detail: fmt.Sprintf("TCP payload: %.2f kB/s up, %.2f down; %.0f changes/s arrived; the agent's CPU %.1f %% of a core",
			float64(u1-u0)/took/1000, float64(d1-d0)/took/1000, got, 100*(cpu1-cpu0)/took),
	}
	if len(ages) > 0 {
		slices.Sort(ages)
		f.Detail += fmt.Sprintf("; age in the cloud p50 %d ms, p99 %d ms", ages[len(ages)/2], ages[len(ages)*99/100])
	}
	if got < 0.98*float64(rate) {
		f.Void = fmt.Sprintf("only %.0f of %d changes a second arrived", got, rate)
	}
	b.r.add(f)
	return nil
}

// change publishes rate changes a second: each device once a second, some of its
// properties, in their order.
func change(ctx context.Context, c *client.Client, topics []string, devices, rate int) error {
	r := mathrand.New(mathrand.NewPCG(1, 1))
	values := make([]float64, len(topics))
	for i := range values {
		values[i] = r.Float64() * 1000
	}
	tick := time.NewTicker(time.Second / time.Duration(devices))
	defer tick.Stop()
	acks := make(chan (<-chan error), 1024)
	failed := make(chan error, 1)
	go func() {
		var first error
		for a := range acks {
			if err := <-a; err != nil && first == nil {
				first = err
			}
		}
		failed <- first
	}()
	err := func() error {
		for turn := 0; ; turn++ {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
			some := r.Perm(properties)[:rate/devices]
			slices.Sort(some)
			for _, p := range some {
				i := turn%devices*properties + p
				values[i] += (r.Float64() - 0.5) * 5
				a, err := c.Send(ctx, client.Message{
					Topic: topic.Topic(topics[i]), QoS: 1, Retain: true,
					Payload: fmt.Appendf(nil, `{"v":%.*f,"t":%d}`, i%3, values[i], time.Now().UnixMilli()),
				})
				if err != nil {
					return err
				}
				acks <- a
			}
		}
	}()
	close(acks)
	if e := <-failed; err == nil && ctx.Err() == nil {
		err = e
	}
	return err
}
