package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) devicesCommand() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "devices",
		Short: "List the devices, their state and how many values are good",
		Long: `List the devices.

  DEVICE       name, with its namespace where that is not --namespace
  STATE        Online: every property was read; Offline: none; Error: some;
               NodeOffline: the link is down, the values are the last ones;
               Unknown: no mapper reported it (ModelMissing and Invalid come from
               the cluster)
  GOOD         properties with a good value, of those that are read
  LAST REPORT  age of the newest report

From a cluster (--kubeconfig) the same comes from Device objects, whose status is
a mirror that is up to 10 s old; the live values are on the broker.`,
		Example: `  fairlead devices
  fairlead devices --broker mqtt://127.0.0.1:2883 --node plant-7
  fairlead devices --kubeconfig cluster.kubeconfig -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.kubeconfig != "" {
				return a.kubeDevices(cmd.Context(), node)
			}
			return a.brokerDevices(cmd.Context(), node)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only the devices of this node")
	return cmd
}

type deviceRow struct {
	Node       string    `json:"node"`
	Namespace  string    `json:"namespace"`
	Device     string    `json:"device"`
	Protocol   string    `json:"protocol,omitempty"`
	State      string    `json:"state"`
	Message    string    `json:"message,omitempty"`
	Good       int       `json:"good"`
	Properties int       `json:"properties"`
	LastReport time.Time `json:"lastReport,omitzero"`
}

// anyNode is the node's level of a filter.
func anyNode(node string) string { return or(node, "+") }

func (a *app) brokerDevices(ctx context.Context, node string) error {
	n := anyNode(node)
	st, err := a.collect(ctx, append(digests(node), topic.OfKind(n, topic.KindDesiredDevice), topic.OfKind(n, topic.KindReportedDevice),
		topic.OfKind(n, topic.KindReportedTwin), topic.OfKind(n, topic.KindReportedLink))...)
	if err != nil {
		return err
	}
	rows := []deviceRow{}
	own := st.ownBus()
	for _, t := range st.twins() {
		if own {
			t.link = nil // on its own bus a node's values are live, whatever the link does
		}
		r := deviceRow{Node: t.node, Namespace: t.ns, Device: t.name, LastReport: t.last()}
		r.State, r.Message = t.state()
		r.Good, r.Properties = t.good()
		if t.wanted != nil {
			r.Protocol = t.wanted.Protocol
		}
		rows = append(rows, r)
	}
	return a.deviceTable(rows, "no device is known at broker "+a.broker)
}

func (a *app) deviceTable(rows []deviceRow, none string) error {
	if a.output == "json" {
		return a.json(rows)
	}
	text := make([][]string, len(rows))
	for i, r := range rows {
		text[i] = []string{a.label(r.Namespace, r.Device), r.Node, or(r.Protocol, "-"), or(r.State, "-"), fmt.Sprintf("%d/%d", r.Good, r.Properties), a.age(r.LastReport)}
	}
	return a.table(none, []string{"DEVICE", "NODE", "PROTOCOL", "STATE", "GOOD", "LAST REPORT"}, text)
}

func (a *app) kubeDevices(ctx context.Context, node string) error {
	list, err := a.listDevices(ctx)
	if err != nil {
		return err
	}
	rows := []deviceRow{}
	for _, d := range list {
		if node != "" && d.Spec.NodeName != node {
			continue
		}
		r := deviceRow{
			Node: d.Spec.NodeName, Namespace: d.Namespace, Device: d.Name, Protocol: d.Status.Protocol,
			State: or(string(d.Status.State), string(device.StateUnknown)), Message: d.Status.Message,
			Properties: len(d.Status.Properties), LastReport: d.Status.LastReportTime,
		}
		for _, p := range d.Status.Properties {
			if p.Quality == "" && len(p.Value) > 0 {
				r.Good++
			}
		}
		rows = append(rows, r)
	}
	return a.deviceTable(rows, "the cluster has no Device")
}

// listDevices reads every Device of the cluster.
func (a *app) listDevices(ctx context.Context) ([]*deviceObject, error) {
	dyn, cfg, err := a.dynamic()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	list, err := dyn.Resource(devices).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, a.kubeError(cfg, err)
	}
	out := make([]*deviceObject, 0, len(list.Items))
	for i := range list.Items {
		d, err := read(&list.Items[i])
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}
