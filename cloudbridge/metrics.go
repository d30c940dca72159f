package cloudbridge

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	writes    *prometheus.CounterVec
	malformed prometheus.Counter
	clones    prometheus.Counter
	// eventDrops counts Kubernetes events by reason.
	eventDrops *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, b *Bridge) *metrics {
	m := &metrics{
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_cloud_kubernetes_writes_total", Help: "Writes to the API server, by kind of object and outcome."}, []string{"kind", "outcome"}),
		malformed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_cloud_malformed_messages_total", Help: "Messages from nodes that could not be read."}),
		clones: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_cloud_node_clones_total", Help: "Links that an agent took back from another one with the same node's name."}),
	}
	m.eventDrops = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "fairlead_cloud_events_dropped_total", Help: "Kubernetes events of nodes that did not become Events, by reason."}, []string{"reason"})
	for _, reason := range []string{eventMalformed, eventForeign, eventFull, eventNoNamespace, eventRefused, eventFailed} {
		m.eventDrops.WithLabelValues(reason)
	}
	if r == nil {
		return m
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	r.MustRegister(m.writes, m.malformed, m.clones, m.eventDrops,
		gauge("fairlead_cloud_events_waiting", "Kubernetes events of nodes that wait to become Events.", func() float64 { return float64(b.events.length()) }),
		gauge("fairlead_cloud_broker_connected", "1 while the broker is connected and in step.", func() float64 {
			if b.Ready() {
				return 1
			}
			return 0
		}),
		gauge("fairlead_cloud_desired_topics", "Desired topics of all nodes.", func() float64 { return float64(b.truth.len()) }),
		gauge("fairlead_cloud_outbox_topics", "Desired topics that wait to be sent.", func() float64 { return float64(b.outbox.Pending()) }),
		gauge("fairlead_cloud_nodes_up", "Nodes whose link is up.", func() float64 { return float64(b.mirror.ups()) }),
		gauge("fairlead_cloud_queue_length", "Status keys that wait for a worker.", func() float64 { return float64(b.status.queue.Len()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "fairlead_cloud_repairs_total", Help: "Repairs of reported state begun."}, func() float64 {
			return float64(b.inbox.Repairs())
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "fairlead_cloud_requests_dropped_total", Help: "Topics and pages that nodes asked for beyond the bound of what may wait."}, func() float64 {
			return float64(b.outbox.Dropped())
		}),
	)
	return m
}
