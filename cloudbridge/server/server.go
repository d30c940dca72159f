package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/cloudbridge"
	"github.com/fairlead-io/fairlead/cloudbridge/token"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// maxClients bounds the nodes on one listener of the embedded broker.
const maxClients = 16384

// Run works until ctx ends.
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	rc, err := restConfig(c.Kubeconfig)
	if err != nil {
		return err
	}
	if err := probe(ctx, rc); err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	g, ctx := errgroup.WithContext(ctx)
	err = c.start(ctx, g, rc, reg)
	if err != nil {
		g.Go(func() error { return err }) // ends what was started
	}
	return g.Wait()
}

// start starts the parts; what it started ends with ctx.
func (c *Config) start(ctx context.Context, g *errgroup.Group, rc *rest.Config, reg *prometheus.Registry) error {
	bc, addresses, synced, err := c.broker(ctx, g, rc, reg)
	if err != nil {
		return err
	}
	b, err := cloudbridge.New(cloudbridge.Config{
		Kube: rc, Broker: bc, DeviceStatusInterval: c.DeviceStatusInterval, Metrics: reg, Logger: c.Logger,
	})
	if err != nil {
		return err
	}
	g.Go(func() error { return b.Run(ctx) })
	if c.Metrics != "" {
		addr, err := c.serveHTTP(ctx, g, reg, func() bool { return b.Ready() && synced() })
		if err != nil {
			return err
		}
		addresses = append(addresses, addr)
	}
	if c.Listening != nil {
		c.Listening(addresses)
	}
	return nil
}

// broker opens the embedded broker, or names the external one. synced tells
// whether the node tokens are known.
func (c *Config) broker(ctx context.Context, g *errgroup.Group, rc *rest.Config, reg prometheus.Registerer) (bc client.Config, addresses []string, synced func() bool, err error) {
	if c.Broker != "" {
		bc, err = c.external()
		return bc, nil, func() bool { return true }, err
	}
	kube, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return bc, nil, nil, fmt.Errorf("kubernetes client: %w", err)
	}
	tokens, err := token.NewChecker(kube, c.namespace(), c.Logger)
	if err != nil {
		return bc, nil, nil, err
	}
	cert, err := c.tls()
	if err != nil {
		return bc, nil, nil, err
	}
	b, err := broker.Open(broker.Options{
		TLS: cert,
		Dir: c.Data, Version: c.Version, Authenticate: c.authenticate(tokens), Durability: broker.CloudDurability,
		MaxClients: maxClients, Metrics: reg, Logger: c.Logger,
	})
	if err != nil {
		return bc, nil, nil, err
	}
	if aside := b.SetAside(); aside != "" {
		c.Logger.Error("the broker's store could not be opened and was set aside; it begins anew and is filled again from kubernetes and the nodes", "set_aside", aside)
	}
	g.Go(func() error {
		<-ctx.Done()
		return b.Close()
	})
	g.Go(func() error { tokens.Run(ctx); return nil })
	// A node that comes before its token is known would be told that it is wrong.
	if !tokens.WaitSynced(ctx) {
		return bc, nil, nil, ctx.Err()
	}
	for _, a := range slices.Concat(c.MQTT, c.Local) {
		at, err := b.Listen(a)
		if err != nil {
			return bc, nil, nil, err
		}
		c.Logger.Info("listening", "address", at)
		addresses = append(addresses, at)
	}
	bc.Dial = func(context.Context) (net.Conn, error) { return b.Pipe() }
	bc.MinBackoff = 100 * time.Millisecond
	return bc, addresses, tokens.Synced, nil
}

// authenticate decides who a client of the embedded broker is.
func (c *Config) authenticate(tokens *token.Checker) func(broker.ConnectInfo) (access.Identity, error) {
	return func(ci broker.ConnectInfo) (access.Identity, error) {
		switch {
		case ci.Listener == broker.InProcess:
			return access.Identity{Role: access.Cloud}, nil
		case slices.Contains(c.Local, ci.Listener) && ci.Username == "" && len(ci.Password) == 0:
			return access.Identity{Role: access.Operator}, nil
		}
		if err := tokens.Check(ci.Username, string(ci.Password)); err != nil {
			return access.Identity{}, err
		}
		return access.Identity{Role: access.Node, Name: ci.Username}, nil
	}
}

func (c *Config) serveHTTP(ctx context.Context, g *errgroup.Group, reg *prometheus.Registry, ready func() bool) (string, error) {
	l, err := net.Listen("tcp", c.Metrics)
	if errors.Is(err, syscall.EADDRINUSE) {
		return "", fmt.Errorf("--metrics %s: the port is in use; choose another: %w", c.Metrics, err)
	}
	if err != nil {
		return "", fmt.Errorf("--metrics %s: %w; want host:port, such as 127.0.0.1:9464", c.Metrics, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready() {
			http.Error(w, "not in step with kubernetes and the broker yet", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve metrics: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return srv.Close()
	})
	return "http://" + l.Addr().String(), nil
}
