package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) twinCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "twin",
		Short: "Read, set and watch the values of devices",
		Long: `A twin is what is known of a device's property: the value that its mapper read,
and the target, which is the newer of the cloud's wish and a local one.

A property is named [namespace/]device/property; --namespace is taken where
there is none.`,
	}
	cmd.AddCommand(a.twinGetCommand(), a.twinSetCommand(), a.twinWatchCommand())
	return cmd
}

func (a *app) twinGetCommand() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "get [[NAMESPACE/]DEVICE[/PROPERTY]]",
		Short: "Show values, targets and whether they were carried out",
		Long: `Show values, targets and whether they were carried out.

  VALUE    what the mapper read last; in parentheses the last good value, where
           the quality is bad
  QUALITY  good, or why there is no value: bad:timeout, bad:unreachable, …
  AGE      since the device produced the value, or the bad quality was noticed
  TARGET   the value that the device is being driven to
  BY       cloud, or local/ and the client that wished
  REV      the target's; give it to --if of "twin set"
  ACK      yes: the mapper carried it out; pending; refused, with the reason

From a cluster (--kubeconfig) the same comes from Device objects, whose status is
a mirror that is up to 10 s old; the live values are on the broker.`,
		Example: `  fairlead twin get pump-1
  fairlead twin get pump-1/pressure -o json
  fairlead twin get plant/pump-1/speed --broker mqtt://127.0.0.1:2883 --node plant-7`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			arg := ""
			if len(args) == 1 {
				arg = args[0]
			}
			return a.twinGet(cmd.Context(), arg, node)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only devices of this node")
	return cmd
}

func (a *app) twinGet(ctx context.Context, arg, node string) error {
	var rs []ref
	if arg != "" {
		var err error
		if rs, err = a.refs(arg); err != nil {
			return err
		}
	}
	var rows []row
	var err error
	where := "at broker " + a.broker
	if a.kubeconfig != "" {
		where = "in the cluster"
		rows, err = a.kubeTwins(ctx)
	} else {
		rows, err = a.brokerTwins(ctx, rs, node)
	}
	if err != nil {
		return err
	}
	if node != "" {
		rows = slices.DeleteFunc(rows, func(r row) bool { return r.Node != node })
	}
	known := rows
	if arg != "" {
		r, ok := choose(rs, rows)
		if !ok {
			return missing(arg, where, rs, known)
		}
		rows = slices.DeleteFunc(slices.Clone(rows), func(w row) bool { return !r.names(w.Namespace, w.Device, w.Property) })
	}
	if a.output == "json" {
		if rows == nil {
			rows = []row{}
		}
		return a.json(rows)
	}
	several := slices.ContainsFunc(rows, func(r row) bool { return r.Node != rows[0].Node })
	headings := []string{"PROPERTY", "VALUE", "UNIT", "QUALITY", "AGE", "TARGET", "BY", "REV", "ACK"}
	if several {
		headings = append(headings, "NODE")
	}
	text := make([][]string, len(rows))
	for i := range rows {
		r := &rows[i]
		target, by, rev := "-", "-", "-"
		if r.Target != nil {
			target, by, rev = shown(r.Target.Value), r.Target.by(), strconv.FormatInt(r.Target.Rev, 10)
		}
		text[i] = []string{
			a.label(r.Namespace, r.Device) + "/" + r.Property, r.value(), or(r.Unit, "-"), or(r.Quality, "-"), a.age(r.Time),
			target, by, rev, r.ack(),
		}
		if several {
			text[i] = append(text[i], r.Node)
		}
	}
	return a.table("no device is known "+where, headings, text)
}

// missing says that there is no such property, and what there is.
func missing(arg, where string, rs []ref, rows []row) error {
	var devices, properties []string
	for _, w := range rows {
		if d := w.Namespace + "/" + w.Device; !slices.Contains(devices, d) {
			devices = append(devices, d)
		}
		for _, r := range rs {
			if r.ns == w.Namespace && r.device == w.Device {
				properties = append(properties, w.Property)
			}
		}
	}
	switch {
	case len(properties) > 0:
		return fmt.Errorf("no property %q %s; the device has %s", arg, where, some(properties))
	case len(devices) == 0:
		return fmt.Errorf("no device %q %s; there is none at all", arg, where)
	default:
		return fmt.Errorf("no device %q %s; there is %s", arg, where, some(devices))
	}
}

// some lists names, the first ten.
func some(names []string) string {
	if len(names) > 10 {
		return strings.Join(names[:10], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// twinFilters selects what the twin commands need: every device, because units
// and types are there, and the values that the reference may mean.
func twinFilters(rs []ref, node string) []topic.Filter {
	n := anyNode(node)
	out := []topic.Filter{topic.OfKind(n, topic.KindDesiredDevice)}
	for _, k := range []topic.Kind{topic.KindDesiredTwin, topic.KindReportedTarget, topic.KindReportedTwin} {
		for _, r := range rs {
			out = append(out, topic.OfDevice(n, k, r.ns, r.device))
		}
		if len(rs) == 0 {
			out = append(out, topic.OfKind(n, k))
		}
	}
	return out
}

func (a *app) brokerTwins(ctx context.Context, rs []ref, node string) ([]row, error) {
	st, err := a.collect(ctx, twinFilters(rs, node)...)
	if err != nil {
		return nil, err
	}
	var rows []row
	for _, t := range st.twins() {
		for _, p := range t.properties {
			rows = append(rows, t.row(p))
		}
	}
	return rows, nil
}

func (a *app) kubeTwins(ctx context.Context) ([]row, error) {
	list, err := a.listDevices(ctx)
	if err != nil {
		return nil, err
	}
	var rows []row
	for _, d := range list {
		for _, p := range d.Status.Properties {
			r := row{
				Node: d.Spec.NodeName, Namespace: d.Namespace, Device: d.Name, Property: p.Name, Unit: p.Unit,
				Value: p.Value, LastValue: p.LastValue, Time: p.Time, Quality: p.Quality,
			}
			if r.Quality == "" && !p.Time.IsZero() {
				r.Quality = good
			}
			if w := p.Desired; w != nil {
				r.Wish = &wishRow{Value: w.Value, Rev: w.Rev}
				r.Acked, r.Error = w.Acked, w.Error
			}
			if t := p.Target; t != nil {
				r.Target = &targetRow{Value: t.Value, Rev: t.Rev, By: t.By, Who: t.Who}
				if t.By != payload.ByCloud {
					r.Acked, r.Error, r.untold = false, "", true // the status tells the fate of the cloud's wishes only
				}
			}
			rows = append(rows, r)
		}
	}
	return rows, nil
}
