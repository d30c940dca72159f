package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// settle is how long a broker is left alone after its start.
const settle = 500 * time.Millisecond

// inPairs runs fn on both brokers in turn, the first of each pair alternating,
// each time on one that was started for it. Without a mosquitto it is ours alone.
func inPairs[T any](ctx context.Context, b *bench, o options, fn func(*running) (T, error)) (us, them []T, err error) {
	for i := range b.pairs {
		turn := []who{ours, theirs}
		if i%2 == 1 {
			turn = []who{theirs, ours}
		}
		for _, w := range turn {
			if w == theirs && b.mosquitto == "" {
				continue
			}
			r, err := b.start(ctx, w, o)
			if err != nil {
				return nil, nil, err
			}
			pause(ctx, settle)
			v, err := fn(r)
			r.stop()
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w\n%s", w, err, r.proc.Tail(5))
			}
			if w == ours {
				us = append(us, v)
			} else {
				them = append(them, v)
			}
		}
	}
	return us, them, nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// each picks one number of every run.
func each[T any](v []T, get func(T) float64) []float64 {
	var out []float64
	for _, x := range v {
		out = append(out, get(x))
	}
	return out
}

// loaded runs a load in pairs.
func (b *bench) loaded(ctx context.Context, l load, o options) (us, them []result, err error) {
	l.Payload, l.Warmup, l.Measure = 64, time.Second, b.measure
	return inPairs(ctx, b, o, func(r *running) (result, error) {
		l := l
		l.Addr, l.Broker = r.addr(), r.proc.PID()
		v, err := l.run(ctx)
		if err == nil {
			say("  %-9s %s", r.who, v)
		}
		return v, err
	})
}

// limits says who was the limit, and what went wrong.
func limits(us, them []result) string {
	part := func(name string, v []result) string {
		s := fmt.Sprintf("%s: broker %.2f + generator %.2f + others %.2f cores", name,
			median(each(v, func(r result) float64 { return r.Broker })), median(each(v, func(r result) float64 { return r.Generator })),
			median(each(v, func(r result) float64 { return r.Others })))
		for _, r := range v {
			if f := r.faults(); f != "" {
				s += ";" + f
			}
		}
		return s
	}
	s := part("ours", us)
	if len(them) > 0 {
		s += "\n      " + part("mosquitto", them)
	}
	return s
}

// void says whether a broker failed in what a load asks of it; then how fast it
// was is no matter.
func void(v []result) string {
	for _, r := range v {
		switch {
		case r.Lost > 0:
			return "as acknowledged messages were not delivered"
		case r.Cut > 0:
			return "as the subscriber was cut off"
		case r.Again > 0:
			return "as messages came twice or out of order"
		}
	}
	return ""
}

// throughput is one load, as fast as it is acknowledged.
func (b *bench) throughput(ctx context.Context, name string, l load, bd *bound) error {
	say("%s: %d pairs of %s", name, b.pairs, b.measure)
	us, them, err := b.loaded(ctx, l, options{})
	if err != nil {
		return err
	}
	acked := func(r result) float64 { return r.Acked }
	b.r.add(figure{
		Name: name + ", acked", Unit: "/s", Ours: each(us, acked), Theirs: each(them, acked), Bound: bd, Void: void(us),
		Detail: limits(us, them),
	})
	if l.Subscriber != "none" {
		delivered := func(r result) float64 { return r.Delivered }
		b.r.add(figure{Name: name + ", delivered", Unit: "/s", Ours: each(us, delivered), Theirs: each(them, delivered), Bound: bd, Void: void(us)})
	}
	if l == durable {
		b.peak = median(each(them, acked))
	}
	return nil
}

// durable is the load of the first figure.
var durable = load{Publishers: 10, Window: 64, Subscriber: "persistent"}

func (b *bench) durableFigure(ctx context.Context) error {
	return b.throughput(ctx, "QoS 1, 10 publishers, persistent session", durable, ratio(true, 1))
}

func (b *bench) cleanFigure(ctx context.Context) error {
	l := durable
	l.Subscriber = "clean"
	return b.throughput(ctx, "QoS 1, 10 publishers, clean session", l, nil)
}

func (b *bench) singleFigure(ctx context.Context) error {
	l := durable
	l.Publishers = 1
	return b.throughput(ctx, "QoS 1, 1 publisher, persistent session", l, ratio(true, 0.9))
}

// The load, retained: with the subscriber of the first figure.
func (b *bench) retainedFigure(ctx context.Context) error {
	l := durable
	l.Retained = 10_000
	return b.throughput(ctx, "QoS 1 retained over 10,000 topics, persistent session", l, ratio(true, 1))
}

func (b *bench) retainedAloneFigure(ctx context.Context) error {
	l := durable
	l.Retained, l.Subscriber = 10_000, "none"
	return b.throughput(ctx, "QoS 1 retained over 10,000 topics, no subscriber", l, ratio(true, 1))
}

// latencyFigure is the latency at half of mosquitto's peak.
func (b *bench) latencyFigure(ctx context.Context) error {
	if b.mosquitto == "" {
		say("  SKIP latency at half of mosquitto's peak: there is no mosquitto")
		return nil
	}
	if b.peak == 0 {
		say("mosquitto's peak, once")
		r, err := b.start(ctx, theirs, options{})
		if err != nil {
			return err
		}
		l := durable
		l.Addr, l.Payload, l.Warmup, l.Measure = r.addr(), 64, time.Second, b.measure
		v, err := l.run(ctx)
		r.stop()
		if err != nil {
			return err
		}
		b.peak = v.Acked
	}
	l := durable
	l.Rate = b.peak / 2
	// Whoever keeps up needs far less; who does not waits here, and it counts.
	l.Window = 1024
	say("latency at %.0f/s: %d pairs of %s", l.Rate, b.pairs, b.measure)
	us, them, err := b.loaded(ctx, l, options{noDelay: true})
	if err != nil {
		return err
	}
	var kept []string
	for _, r := range us {
		kept = append(kept, fmt.Sprintf("%.0f", r.Acked))
	}
	p99 := func(r result) float64 { return r.P99 }
	b.r.add(figure{
		Name: fmt.Sprintf("p99 publish to PUBACK at %.0f/s", l.Rate), Unit: "ms", Ours: each(us, p99), Theirs: each(them, p99),
		Bound: &bound{Of: "difference", Value: 5}, Void: void(us),
		Detail: "acked by ours " + strings.Join(kept, " ") + " /s; " + limits(us, them),
	})
	p50 := func(r result) float64 { return r.P50 }
	b.r.add(figure{Name: fmt.Sprintf("p50 publish to PUBACK at %.0f/s", l.Rate), Unit: "ms", Ours: each(us, p50), Theirs: each(them, p50)})
	return nil
}
