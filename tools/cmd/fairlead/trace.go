package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) traceCommand() *cobra.Command {
	var edge string
	var once bool
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "trace TOPIC",
		Short: "Follow one topic on its way: stored, sent, acked, applied",
		Long: `Follow one topic on its way, until Ctrl-C. --broker is the cloud broker's local
listener, --edge-broker the node's own bus; one of them is enough where it knows
the stage, as the node mirrors what it has to the cloud.

For desired/twin, reported/target and set the newest wish for the property is
followed:

  stored   the cloud's wish is retained on the cloud broker; a local one is the
           target on the node
  sent     the node has taken the cloud's wish for its target; a local target has
           reached the cloud broker
  acked    the mapper has finished with the target: its reading carries the rev
  applied  it was carried out, and this value was read back; refused says why not

For any other topic the newest payload is followed:

  stored   it is retained on its writer's side
  sent     it is retained, byte for byte, on the other side
  acked    the receiver's whole set equals the writer's digest
  applied  a device: its mapper serves this rev

  TIME    when the broker sent it to us. Of what was there before: the time in
          the payload, by its writer's clock, or "-"
  AFTER   since stored
  REV     of the wish or payload, where it has one

Measured on one machine the clock is one; across machines live times are still
ours, those from payloads are not.`,
		Example: `  fairlead trace fl/plant-7/desired/twin/default/pump-1/speedSetpoint \
    --broker mqtt://127.0.0.1:2883 --edge-broker mqtt://127.0.0.1:1883
  fairlead trace fl/plant-7/desired/device/default/pump-1 --once --broker mqtt://127.0.0.1:2883`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.brokerOnly(cmd); err != nil {
				return err
			}
			p, err := topic.Parse(args[0])
			if err != nil {
				return fmt.Errorf("%w; `fairlead topics` lists what there is", err)
			}
			if p.Kind.IsEvent() || strings.HasPrefix(p.Kind.String(), "sync/") {
				return fmt.Errorf("%s is not state: nothing of it is retained, so there is nothing to follow", p.Kind)
			}
			ctx, cancel := follow(cmd.Context(), limit)
			defer cancel()
			return a.trace(ctx, p, edge, once)
		},
	}
	f := cmd.Flags()
	f.StringVar(&edge, "edge-broker", "", "the node's own bus")
	f.BoolVar(&once, "once", false, "print where the topic is now, and end")
	f.DurationVar(&limit, "for", 0, "end after this time; never by default")
	return cmd
}

// stageRow is a line of `trace`.
type stageRow struct {
	Time   time.Time `json:"time,omitzero"`
	Stage  string    `json:"stage"`
	Broker string    `json:"broker,omitempty"`
	// AfterMillis is since stored; absent where one of the times is not known.
	AfterMillis *float64 `json:"afterMs,omitempty"`
	Rev         int64    `json:"rev,omitempty"`
	Detail      string   `json:"detail,omitempty"`
	Reached     bool     `json:"reached"`
}

// from is an arrival with the side that it came from.
type from struct {
	arrival
	edge bool
}

func (a *app) trace(ctx context.Context, p topic.Parsed, edge string, once bool) error {
	tr := &trail{parsed: p, cloud: state{}, edge: state{}}
	first, err := a.connect(ctx, a.broker, subscriptions(tr.filters()...)...)
	if err != nil {
		return ended(ctx, err)
	}
	defer first.stop()
	if err := a.settleState(ctx, first, tr.cloud); err != nil {
		return ended(ctx, err)
	}
	firstIsEdge := false
	var second *session
	if edge != "" {
		if second, err = a.connect(ctx, edge, subscriptions(tr.filters()...)...); err != nil {
			return ended(ctx, err)
		}
		defer second.stop()
		if err := a.settleState(ctx, second, tr.edge); err != nil {
			return ended(ctx, err)
		}
		tr.hasCloud, tr.hasEdge = true, true
	} else {
		firstIsEdge = tr.cloud.ownBus()
		tr.hasCloud, tr.hasEdge = !firstIsEdge, firstIsEdge
		if firstIsEdge {
			tr.cloud, tr.edge = tr.edge, tr.cloud
		}
	}
	t := &tracer{a: a, trail: tr, shown: map[string]bool{}}
	if err := t.print(true); err != nil || once {
		return err
	}
	in := make(chan from, 64)
	pump := func(s *session, edge bool) {
		for {
			select {
			case v := <-s.in:
				select {
				case in <- from{v, edge}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() { defer close(done); pump(first, firstIsEdge) }()
	defer func() { cancel(); <-done }()
	if second != nil {
		done2 := make(chan struct{})
		go func() { defer close(done2); pump(second, true) }()
		defer func() { cancel(); <-done2 }()
	}
	for {
		select {
		case v := <-in:
			name := map[bool]string{true: "edge", false: "cloud"}[v.edge]
			switch {
			case v.down != nil:
				a.note("the connection to the %s broker ended (%v); trying again", name, root(v.down))
				continue
			case v.up:
				a.note("connected to the %s broker again", name)
				continue
			}
			st := tr.cloud
			if v.edge {
				st = tr.edge
			}
			if old, ok := st[v.Topic]; ok && v.replay && string(old.payload) == string(v.Payload) {
				continue // after a reconnect: nothing new
			}
			v.replay = false
			st.put(v.arrival)
			if err := t.print(false); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// tracer prints each stage once.
type tracer struct {
	a     *app
	trail *trail
	shown map[string]bool
	begun bool
}

// print shows the stages that were reached since the last call; all of them for
// pending.
func (t *tracer) print(pending bool) error {
	subject, stages := t.trail.stages()
	var stored time.Time
	for _, s := range stages {
		if s.Stage == "stored" {
			stored = s.Time
		}
		id := stageID(subject, s)
		if t.shown[id] || !s.Reached && !pending {
			continue
		}
		t.shown[id] = s.Reached
		if !stored.IsZero() && !s.Time.IsZero() {
			ms := float64(s.Time.Sub(stored).Microseconds()) / 1000
			s.AfterMillis = &ms
		}
		if err := t.row(s); err != nil {
			return err
		}
	}
	if len(t.shown) > 1000 { // a topic that changes for weeks
		t.shown = map[string]bool{}
		for _, s := range stages {
			t.shown[stageID(subject, s)] = s.Reached
		}
	}
	return nil
}

func stageID(subject string, s stageRow) string {
	return fmt.Sprint(subject, " ", s.Stage, " ", s.Broker, " ", s.Rev)
}

const traceLine = "%-12s  %-8s  %-6s  %10s  %-13s  %s"

func (t *tracer) row(s stageRow) error {
	if t.a.output == "json" {
		return t.a.line(s)
	}
	if !t.begun {
		t.begun = true
		if err := t.text("TIME", "STAGE", "BROKER", "AFTER", "REV", "WHAT"); err != nil {
			return err
		}
	}
	after, rev := "-", "-"
	if s.AfterMillis != nil {
		after = fmt.Sprintf("%.1f ms", *s.AfterMillis)
	}
	if s.Rev != 0 {
		rev = fmt.Sprint(s.Rev)
	}
	return t.text(t.a.clock(s.Time), s.Stage, or(s.Broker, "-"), after, rev, s.Detail)
}

func (t *tracer) text(cells ...any) error {
	_, err := fmt.Fprintln(t.a.out, strings.TrimRight(fmt.Sprintf(traceLine, cells...), " "))
	return err
}
