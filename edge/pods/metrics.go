package pods

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	started, syncErrors, badPods prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, e *Engine) (*metrics, error) {
	m := &metrics{
		started:    prometheus.NewCounter(prometheus.CounterOpts{Name: "fairlead_pods_containers_started_total", Help: "Containers started."}),
		syncErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: "fairlead_pods_sync_errors_total", Help: "Attempts to bring a pod where it should be that failed and were repeated."}),
		badPods:    prometheus.NewCounter(prometheus.CounterOpts{Name: "fairlead_pods_unreadable_total", Help: "Descriptions of pods that could not be read."}),
	}
	if reg == nil {
		return m, nil
	}
	count := func(f func() int) func() float64 { return func() float64 { return float64(f()) } }
	return m, errors.Join(
		reg.Register(m.started), reg.Register(m.syncErrors), reg.Register(m.badPods),
		reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_pods", Help: "Pods on this node, those included that have ended and are not deleted."},
			count(func() int { return len(e.all()) }))),
		reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_pods_runtime_up", Help: "1 while the container runtime answers."},
			count(func() int {
				if e.RuntimeErr() != nil {
					return 0
				}
				return 1
			}))),
	)
}
