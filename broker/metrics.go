package broker

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	slow, storeErrors, expired prometheus.Counter
	refused, dropped           *prometheus.CounterVec
	syncs                      prometheus.Histogram
	droppedAll                 atomic.Uint64
}

func newMetrics(r prometheus.Registerer, b *Broker) *metrics {
	m := &metrics{
		expired: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_broker_sessions_expired_total", Help: "Sessions that ended because their client did not come back in time."}),
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
	counter := func(name, help string, n *atomic.Uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(n.Load()) })
	}
	r.MustRegister(b.store, m.slow, m.storeErrors, m.expired, m.refused, m.dropped, m.syncs,
		counter("fairlead_broker_publishes_received_total", "PUBLISH packets from clients.", &b.stats.publishReceived),
		counter("fairlead_broker_publishes_sent_total", "PUBLISH packets to clients.", &b.stats.publishSent),
		counter("fairlead_broker_bytes_received_total", "Bytes from clients, as MQTT.", &b.stats.bytesReceived),
		counter("fairlead_broker_bytes_sent_total", "Bytes to clients, as MQTT.", &b.stats.bytesSent),
		gauge("fairlead_broker_clients", "Connected clients.", func() float64 { return float64(b.stats.connected.Load()) }),
		gauge("fairlead_broker_sessions_stored", "Sessions that outlive their connection, connected or not.", func() float64 { return float64(b.stats.stored.Load()) }),
		gauge("fairlead_broker_session_messages", "Messages that wait for such sessions.", func() float64 { return float64(b.stats.queued.Load()) }),
		gauge("fairlead_broker_session_bytes", "Bytes that wait for such sessions.", func() float64 { return float64(b.stats.queuedBytes.Load()) }),
		gauge("fairlead_broker_retained_messages", "Retained messages.", func() float64 { return float64(b.retained.len()) }),
		gauge("fairlead_broker_queue_length", "Operations waiting for the core.", func() float64 { return float64(b.inbox.len()) }),
	)
	return m
}

// drop counts messages that one subscriber did not get.
func (m *metrics) drop(reason string, n int) {
	m.dropped.WithLabelValues(reason).Add(float64(n))
	m.droppedAll.Add(uint64(n))
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
