package main

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) nodesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "nodes",
		Short: "List the nodes, their links and how much state they have",
		Long: `List the nodes.

From a broker:
  LINK      Online or Offline; "-" where the node never had a link
  SINCE     the age of the connection; of an Offline one, since it was made
  AGENT     version of the edge agent
  DESIRED   topics that the cloud wants on the node
  REPORTED  topics that the node reported

From a cluster (--kubeconfig): the Node objects of the fabric, with READY
instead of LINK, since when, and their age.`,
		Example: `  fairlead nodes --broker mqtt://127.0.0.1:2883
  fairlead nodes --kubeconfig cluster.kubeconfig
  fairlead nodes -o json | jq -r '.[] | select(.link != "Online") | .node'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.kubeconfig != "" {
				return a.kubeNodes(cmd.Context())
			}
			return a.brokerNodes(cmd.Context())
		},
	}
}

type nodeRow struct {
	Node     string    `json:"node"`
	Link     string    `json:"link,omitempty"`
	Since    time.Time `json:"since,omitzero"`
	Agent    string    `json:"agent,omitempty"`
	Desired  int       `json:"desired"`
	Reported int       `json:"reported"`
	// StoreError is the node's complaint that it can store nothing any more.
	StoreError string `json:"storeError,omitempty"`
}

func (a *app) brokerNodes(ctx context.Context) error {
	st, err := a.collect(ctx,
		topic.OfKind("+", topic.KindReportedLink), topic.OfKind("+", topic.KindReportedNode),
		topic.OfKind("+", topic.KindDesiredDigest), topic.OfKind("+", topic.KindReportedDigest))
	if err != nil {
		return err
	}
	rows, bare := nodeRows(st)
	if len(rows) == 0 || len(bare) > 0 {
		// A node's own bus has no digests, they are for the link: count there.
		if st, err = a.collect(ctx, topic.Desired.AllNodes(), topic.Reported.AllNodes()); err != nil {
			return err
		}
		rows, _ = nodeRows(st)
	}
	if a.output == "json" {
		return a.json(rows)
	}
	text := make([][]string, len(rows))
	for i, r := range rows {
		text[i] = []string{r.Node, or(r.Link, "-"), a.age(r.Since), or(r.Agent, "-"), strconv.Itoa(r.Desired), strconv.Itoa(r.Reported)}
	}
	if err := a.table("no node is known at broker "+a.broker, []string{"NODE", "LINK", "SINCE", "AGENT", "DESIRED", "REPORTED"}, text); err != nil {
		return err
	}
	for _, r := range rows {
		if r.StoreError != "" {
			a.note("node %s cannot store anything any more: %s", r.Node, r.StoreError)
		}
	}
	return nil
}

// nodeRows reads the nodes; bare are those whose digests are not there.
func nodeRows(st state) (rows []nodeRow, bare []string) {
	rows = []nodeRow{}
	type counted struct {
		row               *nodeRow
		desired, reported bool // a digest said the count
		nDesired, nReport int
	}
	nodes := map[string]*counted{}
	for t, r := range st {
		p, err := topic.Parse(string(t))
		if err != nil {
			continue
		}
		c := nodes[p.Node]
		if c == nil {
			c = &counted{row: &nodeRow{Node: p.Node}}
			nodes[p.Node] = c
		}
		if d, ok := p.Direction(); ok && d == topic.Desired {
			c.nDesired++
		} else if ok {
			c.nReport++
		}
		switch p.Kind {
		case topic.KindReportedLink:
			var l payload.Link
			if payload.Decode(r.payload, &l) == nil {
				c.row.Link, c.row.Since, c.row.Agent = "Offline", millis(l.Since), or(c.row.Agent, l.Agent)
				if l.Online {
					c.row.Link = "Online"
				}
			}
		case topic.KindReportedNode:
			var n payload.Node
			if payload.Decode(r.payload, &n) == nil {
				c.row.Agent, c.row.StoreError = or(n.Agent, c.row.Agent), n.StoreError
			}
		case topic.KindDesiredDigest, topic.KindReportedDigest:
			var d payload.Digest
			if payload.Decode(r.payload, &d) != nil {
				continue
			}
			if p.Kind == topic.KindDesiredDigest {
				c.row.Desired, c.desired = d.Count, true
			} else {
				c.row.Reported, c.reported = d.Count, true
			}
		}
	}
	for n, c := range nodes {
		if !c.desired {
			c.row.Desired = c.nDesired
		}
		if !c.reported {
			c.row.Reported = c.nReport
		}
		if !c.desired && !c.reported {
			bare = append(bare, n)
		}
		rows = append(rows, *c.row)
	}
	slices.SortFunc(rows, func(x, y nodeRow) int { return strings.Compare(x.Node, y.Node) })
	return rows, bare
}

type kubeNodeRow struct {
	Node    string    `json:"node"`
	Ready   string    `json:"ready"`
	Reason  string    `json:"reason,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	Agent   string    `json:"agent,omitempty"`
	Created time.Time `json:"created"`
}

func (a *app) kubeNodes(ctx context.Context) error {
	k, cfg, err := a.kube()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	list, err := k.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: edgeLabel})
	if err != nil {
		return a.kubeError(cfg, err)
	}
	rows := make([]kubeNodeRow, 0, len(list.Items))
	text := make([][]string, 0, len(list.Items))
	for i := range list.Items {
		n := &list.Items[i]
		r := kubeNodeRow{Node: n.Name, Ready: string(corev1.ConditionUnknown), Agent: n.Status.NodeInfo.KubeletVersion, Created: n.CreationTimestamp.Time}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				r.Ready, r.Reason, r.Since = string(c.Status), c.Reason, c.LastTransitionTime.Time
			}
		}
		rows = append(rows, r)
		text = append(text, []string{r.Node, r.Ready, a.age(r.Since), or(r.Agent, "-"), a.age(r.Created)})
	}
	if a.output == "json" {
		return a.json(rows)
	}
	return a.table("the cluster has no Node with the label "+edgeLabel, []string{"NODE", "READY", "SINCE", "AGENT", "AGE"}, text)
}
