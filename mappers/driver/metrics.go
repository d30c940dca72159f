package driver

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

type metrics struct {
	registry  *prometheus.Registry
	polls     *prometheus.CounterVec
	duration  prometheus.Histogram
	skipped   prometheus.Counter
	readings  *prometheus.CounterVec
	writes    *prometheus.CounterVec
	delay     prometheus.Histogram
	devices   *prometheus.GaugeVec
	publishes *prometheus.CounterVec
	conflated prometheus.Counter
	busUp     prometheus.Gauge
	malformed prometheus.Counter
}

func newMetrics(mapper string) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		polls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_mapper_polls_total",
			Help: "Reads of a device by result: ok, partial (some properties failed), error (all failed), silent (no answer).",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "fairlead_mapper_poll_duration_seconds",
			Help:    "How long reading the due properties of a device took.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 10), // 0.5 ms to 1.9 s
		}),
		skipped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_mapper_poll_ticks_skipped_total",
			Help: "Poll ticks skipped because the device or its line was too slow.",
		}),
		readings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_mapper_readings_total",
			Help: "Readings reported by quality: good or the word after bad.",
		}, []string{"quality"}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_mapper_writes_total",
			Help: "Targets by result: ok, retry, or the reason for which they were not applied.",
		}, []string{"result"}),
		delay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "fairlead_mapper_write_duration_seconds",
			Help:    "From a target's arrival at the mapper to its acknowledgement, read-back included.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}),
		devices: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "fairlead_mapper_devices",
			Help: "Devices served by state.",
		}, []string{"state"}),
		publishes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_mapper_publishes_total",
			Help: "Messages to the bus by result: ok, refused, error.",
		}, []string{"result"}),
		conflated: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_mapper_publishes_conflated_total",
			Help: "Payloads replaced by a newer one before the bus took them.",
		}),
		busUp: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "fairlead_mapper_bus_up",
			Help: "1 while the node's bus is connected.",
		}),
		malformed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_mapper_malformed_messages_total",
			Help: "Messages from the bus that could not be read.",
		}),
	}
	r := prometheus.WrapRegistererWith(prometheus.Labels{"mapper": mapper}, m.registry)
	r.MustRegister(m.polls, m.duration, m.skipped, m.readings, m.writes, m.delay, m.devices,
		m.publishes, m.conflated, m.busUp, m.malformed)
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, s := range []string{payload.DeviceOnline, payload.DeviceOffline, payload.DeviceError} {
		m.devices.WithLabelValues(s) // so that a rate has a start
	}
	return m
}
