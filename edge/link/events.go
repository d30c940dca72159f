package link

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// The bounds of what the replay of events has in flight. Half of what our broker
// grants is left to the state. The bytes are paced: what is in flight is what
// the state has to wait for.
const (
	maxEventsInFlight = 512
	minEventBytes     = 4 << 10
	firstEventBytes   = 16 << 10
	maxEventBytes     = 1 << 20
	// eventPage is how many events are read from the log at once.
	eventPage = 256
	// settleEvents is how many acknowledged events leave the log together, unless
	// nothing more is in flight.
	settleEvents = 128
	// yield is how often the replay looks whether the state is out.
	yield = 5 * time.Millisecond
)

// The wait after an event that the broker could not take.
const (
	minEventRetry = time.Second
	maxEventRetry = 30 * time.Second
)

// replay sends the event log to the cloud, in order, while there is a link.
type replay struct {
	bus    *broker.Broker
	link   *Link
	prefix string        // of the node's own events
	turn   chan struct{} // held by run: that of the connection before ends first

	sent    prometheus.Counter
	refused *prometheus.CounterVec
}

func newReplay(l *Link) *replay {
	r := &replay{
		bus: l.bus, link: l, turn: make(chan struct{}, 1),
		prefix: strings.TrimSuffix(string(topic.OfKind(l.cfg.Node, topic.KindEvent)), "#"),
		sent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_link_events_sent_total", Help: "Records of the event log that the cloud broker acknowledged."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_link_events_refused_total", Help: "Negative acknowledgements of events: retry for those sent again, drop for those replaced with a gap marker."}, []string{"fate"}),
	}
	for _, fate := range []string{fateRetry, fateDrop} {
		r.refused.WithLabelValues(fate)
	}
	if l.cfg.Metrics != nil {
		l.cfg.Metrics.MustRegister(r.sent, r.refused)
	}
	return r
}

const (
	fateRetry = "retry"
	fateDrop  = "drop"
)

// run replays until ctx, which is one connection's, ends or sending fails.
func (r *replay) run(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	wait := minEventRetry
	for {
		began := time.Now()
		err := r.pass(ctx)
		var again *client.Refused
		if !errors.As(err, &again) && !errors.Is(err, errLog) {
			return err
		}
		if time.Since(began) > maxEventRetry {
			wait = minEventRetry
		}
		r.link.log.Warn("events wait: the replay goes on from the event that was not taken", "retry", wait, "error", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		wait = min(2*wait, maxEventRetry)
	}
}

// errLog says that the log cannot be read at the moment.
var errLog = errors.New("event log")

// pass is a replay from the first record that the cloud does not have, up to a
// negative answer or the connection's end.
type pass struct {
	*replay
	page []store.Event // read, not yet sent
	dry  bool          // the log had no more
	next uint64        // the number to read on from
	sum  uint64        // of the last record sent

	inflight []flight
	bytes    int
	pace     pace

	taken  store.Event // the newest acknowledged record
	unsaid int         // acknowledged ones that the log does not know of
}

// flight is a record on its way.
type flight struct {
	event store.Event
	ack   <-chan error
	sent  time.Time
	gone  bool // refused for good, and replaced with a gap marker
}

// pass ends with a *client.Refused where the broker could not take an event now.
func (r *replay) pass(ctx context.Context) error {
	p := &pass{replay: r, pace: newPace()}
	defer p.leave(ctx)
	timer := time.NewTimer(yield)
	defer timer.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.read(); err != nil {
			return err
		}
		room := len(p.page) > 0 && len(p.inflight) < maxEventsInFlight &&
			(len(p.inflight) == 0 || p.bytes+size(&p.page[0]) <= p.pace.window)
		held := room && r.link.out.Pending() > 0 // state first
		if room && !held {
			if err := p.send(ctx); err != nil {
				return err
			}
			select { // what is answered makes room
			case err := <-p.inflight[0].ack:
				if err := p.answered(ctx, err); err != nil {
					return err
				}
			default:
			}
			continue
		}
		var (
			head   <-chan error
			signal <-chan struct{}
			wake   <-chan time.Time
		)
		if len(p.inflight) > 0 {
			head = p.inflight[0].ack
		}
		if p.dry {
			signal = r.bus.EventSignal()
		}
		if held {
			timer.Reset(yield)
			wake = timer.C
		}
		select {
		case err := <-head:
			if err := p.answered(ctx, err); err != nil {
				return err
			}
		case <-signal:
			p.dry = false
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// read gets the next page of the log where the last one is sent.
func (p *pass) read() error {
	if len(p.page) > 0 || p.dry {
		return nil
	}
	page, err := p.bus.Events(p.next, eventPage)
	if err != nil {
		if errors.Is(err, broker.ErrClosed) {
			return err
		}
		return fmt.Errorf("%w: %w", errLog, err)
	}
	p.page, p.dry = page, len(page) == 0
	return nil
}

// size is what a record weighs on the wire, about.
func size(e *store.Event) int { return 100 + len(e.Topic) + len(e.Payload) }

// send puts the next record on its way.
func (p *pass) send(ctx context.Context) error {
	e := p.page[0]
	first := p.next == 0
	m := p.message(&e)
	m.User = append(id(&e, first), m.User...)
	ack, err := p.link.c.Send(ctx, m)
	if err != nil {
		return err
	}
	f := flight{event: e, ack: ack, sent: time.Now()}
	select {
	case err := <-ack:
		// The client knows at once of what the broker would not take. Its gap
		// marker can still keep the order.
		if tooLarge(err) {
			if err := p.replace(ctx, &f, first, err); err != nil {
				return err
			}
		} else {
			again := make(chan error, 1)
			again <- err
			f.ack = again
		}
	default:
	}
	p.page = p.page[1:]
	p.next, p.sum = e.Seq+1, e.Sum
	p.bytes += size(&e)
	p.inflight = append(p.inflight, f)
	return nil
}

func id(e *store.Event, first bool) [][2]string {
	x := payload.EventID{Epoch: broker.Epoch(e.Epoch), Seq: e.Seq, Time: e.Time, First: first}
	return x.UserProperties()
}

// message gives a record as the cloud gets it.
func (p *pass) message(e *store.Event) client.Message {
	now := payload.Millis(time.Now())
	switch {
	case e.Gap != nil:
		g := payload.EventGap{Epoch: broker.Epoch(e.Epoch), From: e.Gap.From, To: e.Seq, Bytes: e.Sum - e.Gap.Before, T: e.Time}
		if p.next > g.From {
			// Those before were dropped while they were under way: they do arrive.
			g.From, g.Bytes = p.next, e.Sum-p.sum
		}
		g.Count = g.To - g.From + 1
		return p.gap(g)
	case e.Expires != 0 && e.Expires <= now:
		return p.gap(missing(e, "expired"))
	case !strings.HasPrefix(e.Topic, p.prefix):
		return p.gap(missing(e, "an event of another node"))
	}
	m := client.Message{
		Topic: topic.Topic(e.Topic), Payload: e.Payload, QoS: 1,
		ContentType: e.Props.ContentType, PayloadFormat: e.Props.PayloadFormat,
		ResponseTopic: e.Props.ResponseTopic, CorrelationData: e.Props.CorrelationData, User: e.Props.User,
	}
	if e.Expires != 0 {
		m.Expiry = uint32((e.Expires - now + 999) / 1000)
	}
	return m
}

func (r *replay) gap(g payload.EventGap) client.Message {
	return client.Message{Topic: topic.EventGap(r.link.cfg.Node), Payload: payload.Encode(g), QoS: 1}
}

// missing describes the gap that one event leaves.
func missing(e *store.Event, why string) payload.EventGap {
	return payload.EventGap{
		Epoch: broker.Epoch(e.Epoch), From: e.Seq, To: e.Seq, Count: 1, Bytes: e.Sum - e.Before,
		T: payload.Millis(time.Now()), Err: why,
	}
}

// answered takes the answer to the oldest record in flight.
func (p *pass) answered(ctx context.Context, err error) error {
	f := &p.inflight[0]
	if err != nil {
		var refused *client.Refused
		if !errors.As(err, &refused) {
			return err
		}
		if !hopeless(refused) {
			p.refused.WithLabelValues(fateRetry).Inc()
			return fmt.Errorf("event %d of epoch %s: %w", f.event.Seq, broker.Epoch(f.event.Epoch), err)
		}
		if !f.gone {
			return p.replace(ctx, f, true, err)
		}
		// Not even the marker: there is no other way to tell.
	}
	size := size(&f.event)
	p.bytes -= size
	p.pace.acked(time.Since(f.sent), size, time.Now())
	p.sent.Inc()
	p.taken, p.unsaid = f.event, p.unsaid+1
	p.inflight = p.inflight[1:]
	if p.unsaid < settleEvents && len(p.inflight) > 0 {
		return nil
	}
	p.unsaid = 0
	return p.bus.EventsTaken(ctx, p.taken)
}

// hopeless tells an answer that would be the same the next time.
func hopeless(r *client.Refused) bool {
	switch r.Code {
	case 0x90, 0x95, 0x99: // topic name invalid, packet too large, payload format invalid
		return true
	}
	return false
}

func tooLarge(err error) bool {
	var refused *client.Refused
	return errors.As(err, &refused) && refused.Code == 0x95
}

// replace sends a gap marker in the place of an event that the broker refused
// for good.
func (p *pass) replace(ctx context.Context, f *flight, first bool, why error) error {
	p.refused.WithLabelValues(fateDrop).Inc()
	p.link.log.Error("the cloud broker refuses an event; it gets a gap marker in its place", "topic", f.event.Topic, "seq", f.event.Seq, "error", why)
	m := p.gap(missing(&f.event, why.Error()))
	m.User = id(&f.event, first)
	ack, err := p.link.c.Send(ctx, m)
	if err != nil {
		return err
	}
	f.ack, f.sent, f.gone = ack, time.Now(), true
	return nil
}

// leave tells the log of what was acknowledged, so that the next connection does
// not send it again.
func (p *pass) leave(ctx context.Context) {
	for len(p.inflight) > 0 {
		select {
		case err := <-p.inflight[0].ack:
			if err == nil {
				p.sent.Inc()
				p.taken, p.unsaid = p.inflight[0].event, p.unsaid+1
				p.inflight = p.inflight[1:]
				continue
			}
		default:
		}
		break
	}
	if p.unsaid > 0 {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = p.bus.EventsTaken(ctx, p.taken) // not known, it is sent again
	}
}

// pace bounds the bytes in flight by how long they take: the state has to wait
// behind them. The window grows while answers come about as fast as they can,
// and shrinks when they take a second longer than that.
type pace struct {
	window int
	base   time.Duration // the shortest answer
	shrunk time.Time     // what was sent before says nothing new
}

func newPace() pace { return pace{window: firstEventBytes} }

// The delays that events in flight may add.
const (
	paceGrow   = 100 * time.Millisecond
	paceShrink = time.Second
)

func (p *pace) acked(took time.Duration, bytes int, now time.Time) {
	if p.base == 0 || took < p.base {
		p.base = took
	}
	switch late := took - p.base; {
	case late < paceGrow:
		p.window = min(p.window+bytes, maxEventBytes)
	case late > paceShrink && now.Add(-took).After(p.shrunk):
		p.window, p.shrunk = max(p.window/2, minEventBytes), now
	}
}
