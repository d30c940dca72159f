package broker

import (
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	received, sent, slow, storeErrors prometheus.Counter
	refused, dropped                  *prometheus.CounterVec
	syncs                             prometheus.Histogram
}

func newMetrics(r prometheus.Registerer, b *Broker) *metrics {
	m := &metrics{
		received: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_broker_publishes_received_total", Help: "PUBLISH packets from clients."}),
		sent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_broker_publishes_sent_total", Help: "PUBLISH packets to clients."}),
		slow: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_broker_slow_clients_disconnected_total", Help: "Clients disconnected because their outbound queue was full."}),
		storeErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_broker_store_errors_total", Help: "Commits that the store refused or failed."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_broker_refused_total", Help: "Connections, subscriptions, packets and publishes refused, by reason."}, []string{"reason"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_broker_messages_dropped_total", Help: "Messages not delivered to one subscriber, by reason."}, []string{"reason"}),
		syncs: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "fairlead_broker_store_sync_seconds", Help: "Duration of synced commits.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 10)}),
	}
	if r == nil {
		return m
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	r.MustRegister(m.received, m.sent, m.slow, m.storeErrors, m.refused, m.dropped, m.syncs,
		gauge("fairlead_broker_clients", "Connected clients.", func() float64 {
			b.mu.Lock()
			defer b.mu.Unlock()
			return float64(len(b.mu.conns))
		}),
		gauge("fairlead_broker_retained_messages", "Retained messages.", func() float64 { return float64(b.retained.len()) }),
		gauge("fairlead_broker_store_bytes", "Size of the store on disk.", func() float64 { return float64(b.store.DiskUsage()) }),
		gauge("fairlead_broker_queue_length", "Publishes waiting for the core.", func() float64 { return float64(len(b.ops)) }),
	)
	return m
}

// limiter logs a repeated event once a minute per key, with how often it was
// left out since.
type limiter struct {
	mu   sync.Mutex
	seen map[string]*limited
}

type limited struct {
	since   time.Time
	skipped int
}

// maxLimited bounds the keys that are remembered.
const maxLimited = 1024

func newLimiter() *limiter { return &limiter{seen: map[string]*limited{}} }

func (l *limiter) log(log *slog.Logger, msg, key string, args ...any) {
	l.mu.Lock()
	now := time.Now()
	e := l.seen[msg+key]
	if e != nil && now.Sub(e.since) < time.Minute {
		e.skipped++
		l.mu.Unlock()
		return
	}
	skipped := 0
	if e != nil {
		skipped = e.skipped
	}
	if len(l.seen) >= maxLimited {
		clear(l.seen)
	}
	l.seen[msg+key] = &limited{since: now}
	l.mu.Unlock()
	if skipped > 0 {
		args = append(args, "repeated", skipped)
	}
	log.Warn(msg, args...) //nolint:sloglint // the callers' messages are constants
}
