package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) twinWatchCommand() *cobra.Command {
	var node string
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "watch [[NAMESPACE/]DEVICE[/PROPERTY]]",
		Short: "Print values, targets and states as they change, until Ctrl-C",
		Long: `Print values, targets and states as they change, until Ctrl-C, beginning with
those that there are. The time is the source's: that of the reading, of the
target, of the state. With -o json each line is one JSON object.`,
		Example: `  fairlead twin watch
  fairlead twin watch pump-1/pressure --for 30s`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.brokerOnly(cmd); err != nil {
				return err
			}
			var rs []ref
			if len(args) == 1 {
				var err error
				if rs, err = a.refs(args[0]); err != nil {
					return err
				}
			}
			ctx, cancel := follow(cmd.Context(), limit)
			defer cancel()
			return a.twinWatch(ctx, rs, node)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only devices of this node")
	cmd.Flags().DurationVar(&limit, "for", 0, "end after this time; never by default")
	return cmd
}

// follow bounds a command that follows; 0 is no bound.
func follow(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, limit)
}

// change is a line of `twin watch`.
type change struct {
	Time      time.Time       `json:"time"`
	Node      string          `json:"node"`
	Namespace string          `json:"namespace"`
	Device    string          `json:"device"`
	Property  string          `json:"property,omitempty"`
	What      string          `json:"what"` // value, target, state or gone
	Value     json.RawMessage `json:"value,omitempty"`
	LastValue json.RawMessage `json:"lastValue,omitempty"`
	Unit      string          `json:"unit,omitempty"`
	Quality   string          `json:"quality,omitempty"`
	By        string          `json:"by,omitempty"`
	Rev       int64           `json:"rev,omitempty"`
	State     string          `json:"state,omitempty"`
	Error     string          `json:"error,omitempty"`
}

func (a *app) twinWatch(ctx context.Context, rs []ref, node string) error {
	n := anyNode(node)
	f := []topic.Filter{topic.OfKind(n, topic.KindDesiredDevice)}
	for _, k := range []topic.Kind{topic.KindReportedTarget, topic.KindReportedTwin} {
		for _, r := range rs {
			f = append(f, topic.OfDevice(n, k, r.ns, r.device))
		}
		if len(rs) == 0 {
			f = append(f, topic.OfKind(n, k))
		}
	}
	f = append(f, topic.OfKind(n, topic.KindReportedDevice))
	s, err := a.connect(ctx, a.broker, subscriptions(f...)...)
	if err != nil {
		return err
	}
	defer s.stop()
	st := state{}
	if err := a.settleState(ctx, s, st); err != nil {
		return ended(ctx, err)
	}
	known := rowsOf(st)
	if len(rs) > 0 {
		if r, ok := choose(rs, known); ok {
			rs = []ref{r}
		} else {
			a.note("%v", missing(rs[0].String(), "at broker "+a.broker, rs, known))
			a.note("waiting for it to come")
		}
	}
	topics := make([]topic.Topic, 0, len(st))
	for t := range st {
		topics = append(topics, t)
	}
	slices.Sort(topics)
	for _, t := range topics {
		if err := a.changed(st, rs, t, st[t].payload); err != nil {
			return err
		}
	}
	for {
		select {
		case v := <-s.in:
			switch {
			case v.down != nil:
				a.note("the connection to broker %s ended (%v); trying again", a.broker, root(v.down))
				continue
			case v.up:
				a.note("connected to broker %s again", a.broker)
				continue
			}
			old, had := st[v.Topic]
			st.put(v)
			if v.replay && had && string(old.payload) == string(v.Payload) {
				continue // after a reconnect: nothing new
			}
			if err := a.changed(st, rs, v.Topic, v.Payload); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// ended tells an interrupted command from a failed one.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func rowsOf(st state) []row {
	var rows []row
	for _, t := range st.twins() {
		for _, p := range t.properties {
			rows = append(rows, t.row(p))
		}
	}
	return rows
}

// changed prints what a message changed, if it is about one of the references.
func (a *app) changed(st state, rs []ref, t topic.Topic, b []byte) error {
	p, err := topic.Parse(string(t))
	if err != nil || len(rs) > 0 && !slices.ContainsFunc(rs, func(r ref) bool {
		return p.Property == "" && r.ns == p.Namespace && r.device == p.Name || r.names(p.Namespace, p.Name, p.Property)
	}) {
		return nil //nolint:nilerr // not ours to show
	}
	c := change{Time: a.now().UTC(), Node: p.Node, Namespace: p.Namespace, Device: p.Name, Property: p.Property}
	name := a.label(p.Namespace, p.Name)
	var text string
	switch p.Kind {
	case topic.KindReportedTwin:
		name += "/" + p.Property
		c.What, c.Unit = "value", st.unit(p)
		r := decode[payload.Reading](b)
		if r == nil {
			c.What, text = "gone", "no value any more"
			break
		}
		c.Time, c.Quality, c.LastValue, c.Error = millis(r.T), or(r.Q, good), r.LV, r.Err
		if string(r.V) != "null" {
			c.Value = r.V
		}
		v := row{Value: c.Value, LastValue: c.LastValue}
		text = strings.TrimSpace(v.value() + " " + c.Unit)
		if !r.Good() {
			text += "  " + r.Q
		}
		if r.Err != "" {
			text += "  target refused: " + r.Err
		}
	case topic.KindReportedTarget:
		name += "/" + p.Property
		c.What, c.Unit = "target", st.unit(p)
		g := decode[payload.Target](b)
		if g == nil {
			c.What, text = "gone", "no target any more"
			break
		}
		c.Time, c.Value, c.By, c.Rev = millis(g.T), g.V, g.By, g.Rev
		by := targetRow{By: g.By, Who: g.Who}
		text = strings.TrimSpace("→ "+shown(g.V)+" "+c.Unit) + "  by " + by.by()
	case topic.KindReportedDevice:
		c.What = "state"
		d := decode[payload.DeviceStatus](b)
		if d == nil {
			c.What, text = "gone", "no state any more"
			break
		}
		c.Time, c.State, c.Error = millis(d.Since), d.State, d.Error
		text = d.State
		if d.Error != "" {
			text += ": " + d.Error
		}
	default:
		return nil
	}
	if a.output == "json" {
		return a.line(c)
	}
	_, err = fmt.Fprintf(a.out, "%s  %-28s  %s\n", a.clock(c.Time), name, text)
	return err
}

// unit is the unit of a property, from its device's model.
func (st state) unit(p topic.Parsed) string {
	d := st.device(p)
	if d == nil {
		return ""
	}
	if m, ok := d.Property(p.Property); ok {
		return m.Unit
	}
	return ""
}
