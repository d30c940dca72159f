package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// flushLimit bounds how long a stopping mapper waits for the bus to take its
// last readings.
const flushLimit = time.Second

// Config says which bus to serve, and as whom.
type Config struct {
	// Bus is the URL of the node's bus: mqtt://host:port, ws://host:port/path
	// or unix:///path.
	Bus string
	// Node is the name of the edge node.
	Node string
	// Name is the mapper's: its user name on the bus and the mapper in a
	// device's status. The drivers' protocols where it is empty.
	Name string
	// TokenFile holds the mapper's password for the bus; none where it is empty.
	TokenFile string
	// Metrics is the address of /metrics, /healthz and /readyz; none where it is empty.
	Metrics string
	// Listening is called with the metrics endpoint's real address, if not nil.
	Listening func(net.Addr)
	// Transport takes the place of the bus at the URL, if not nil.
	Transport Bus
	// Logger is slog.Default() where it is nil.
	Logger *slog.Logger
}

// Validate refuses what cannot work.
func (c *Config) Validate() error {
	var errs []error
	if err := topic.CheckName("node", c.Node); err != nil {
		errs = append(errs, err)
	}
	if c.Name != "" {
		if err := topic.CheckName("mapper", c.Name); err != nil {
			errs = append(errs, err)
		}
	}
	if c.Bus == "" && c.Transport == nil {
		errs = append(errs, errors.New("bus: want its URL, such as mqtt://127.0.0.1:1883"))
	}
	return errors.Join(errs...)
}

// Run serves the bus's devices of the drivers' protocols until ctx ends, and
// returns when everything it started has ended. The error is nil if ctx ended.
func Run(ctx context.Context, cfg Config, drivers ...Driver) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if len(drivers) == 0 {
		return errors.New("no driver: a mapper wants at least one protocol")
	}
	if cfg.Name == "" {
		var words []string
		for _, d := range drivers {
			words = append(words, d.Protocol())
		}
		cfg.Name = strings.Join(words, "-")
	}
	log := cfg.Logger
	if log == nil {
		log = slog.Default()
	}
	log = log.With("node", cfg.Node, "mapper", cfg.Name)
	bus := cfg.Transport
	if bus == nil {
		token, err := readToken(cfg.TokenFile)
		if err != nil {
			return err
		}
		bus = NewMQTT(cfg.Bus, cfg.Name, token, log)
	}

	m := newMetrics(cfg.Name)
	out := newOutbox(bus, m, log)
	e := newEngine(cfg.Node, cfg.Name, drivers, out, m, log)
	var listener net.Listener
	if cfg.Metrics != "" {
		var err error
		if listener, err = net.Listen("tcp", cfg.Metrics); err != nil {
			return fmt.Errorf("metrics endpoint: %w", err)
		}
		if cfg.Listening != nil {
			cfg.Listening(listener.Addr())
		}
	}

	// The bus and the outbox outlive the workers, so that the last readings get out.
	busCtx, stopBus := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBus()
	engineCtx, stopEngine := context.WithCancel(ctx)
	defer stopEngine()

	var busErr error
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stopEngine() // without a bus there is nothing to serve
		busErr = bus.Run(busCtx, e.filters(), e.inbox)
	})
	wg.Go(func() { out.run(busCtx) })
	if listener != nil {
		wg.Go(func() { serveMetrics(busCtx, listener, e, log) })
	}
	e.run(engineCtx)
	flushCtx, cancel := context.WithTimeout(busCtx, flushLimit)
	out.flush(flushCtx)
	cancel()
	stopBus()
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	if busErr == nil {
		busErr = errors.New("the bus client ended")
	}
	return busErr
}

func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("mapper's token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("mapper's token: %s is empty", file)
	}
	return token, nil
}

// serveMetrics serves until ctx ends.
func serveMetrics(ctx context.Context, l net.Listener, e *engine, log *slog.Logger) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(e.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !e.ready.Load() || !e.inbox.link().up {
			http.Error(w, "waiting for the bus", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		log.Error("metrics endpoint ended", "error", err)
	}
}
