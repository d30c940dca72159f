package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

func (a *app) topicsCommand() *cobra.Command {
	var tree bool
	cmd := &cobra.Command{
		Use:   "topics [FILTER]",
		Short: "List retained topics with size, age and writer",
		Long: `List the retained topics that an MQTT filter selects: # for all of them, which is
the default, + for one level.

  SIZE    of the payload
  AGE     since the time that the payload itself carries; MQTT has none, so "-"
          where there is none in it
  WRITER  who may write the topic: cloud, node, mapper; user for all topics that
          do not begin with fl/`,
		Example: `  fairlead topics
  fairlead topics 'fl/plant-7/desired/#'
  fairlead topics 'fl/+/reported/twin/#' -o json
  fairlead topics --tree`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.brokerOnly(cmd); err != nil {
				return err
			}
			f := topic.Filter("#")
			if len(args) == 1 {
				f = topic.Filter(args[0])
			}
			if err := checkFilter(f); err != nil {
				return err
			}
			return a.topics(cmd.Context(), f, tree)
		},
	}
	cmd.Flags().BoolVar(&tree, "tree", false, "as a tree, with the number and size of the topics below each level")
	return cmd
}

// checkFilter refuses what no broker can take [MQTT-4.7.1-1], [MQTT-4.7.1-2].
func checkFilter(f topic.Filter) error {
	levels := strings.Split(string(f), "/")
	for i, l := range levels {
		if l == "#" && i == len(levels)-1 || l == "+" || !strings.ContainsAny(l, "+#") {
			continue
		}
		return fmt.Errorf("filter %q: + and # stand for whole levels, # for the last one", f)
	}
	if f == "" {
		return fmt.Errorf("filter %q is empty: want # for all topics", f)
	}
	return nil
}

type topicRow struct {
	Topic  string    `json:"topic"`
	Size   int       `json:"size"`
	Time   time.Time `json:"time,omitzero"`
	Writer string    `json:"writer"`
}

func (a *app) topics(ctx context.Context, f topic.Filter, tree bool) error {
	st, err := a.collect(ctx, f)
	if err != nil {
		return err
	}
	rows := make([]topicRow, 0, len(st))
	total := 0
	for t, r := range st {
		rows = append(rows, topicRow{Topic: string(t), Size: len(r.payload), Time: timeOf(t, r.payload), Writer: writerOf(t)})
		total += len(r.payload)
	}
	slices.SortFunc(rows, func(x, y topicRow) int { return strings.Compare(x.Topic, y.Topic) })
	switch {
	case a.output == "json":
		return a.json(rows)
	case len(rows) == 0:
		a.note("no retained topic of broker %s matches %s", a.broker, f)
		return nil
	case tree:
		a.tree(rows)
	default:
		text := make([][]string, len(rows))
		for i, r := range rows {
			text[i] = []string{r.Topic, size(r.Size), a.age(r.Time), r.Writer}
		}
		if err := a.table("", []string{"TOPIC", "SIZE", "AGE", "WRITER"}, text); err != nil {
			return err
		}
	}
	if a.terminal {
		fmt.Fprintf(a.out, "\n%s, %s\n", plural(len(rows), "topic", "topics"), size(total))
	}
	return nil
}

// writerOf names who may write a topic.
func writerOf(t topic.Topic) string {
	if !topic.Owned(string(t)) {
		return "user"
	}
	p, err := topic.Parse(string(t))
	if err != nil {
		return "nobody" // not in the wire contract; a broker of ours does not take it
	}
	switch p.Kind.Writer() {
	case topic.WriterCloud:
		return "cloud"
	case topic.WriterNode:
		return "node"
	case topic.WriterMapper:
		return "mapper"
	case topic.WriterLocal:
		return "local"
	default:
		return "nobody"
	}
}

// timeOf is the time that one of Fairlead's payloads carries, zero without one.
func timeOf(t topic.Topic, b []byte) time.Time {
	if !topic.Owned(string(t)) {
		return time.Time{}
	}
	var v struct {
		T, Since json.Number
		Rev      json.Number
	}
	if json.Unmarshal(b, &v) != nil {
		return time.Time{}
	}
	for _, n := range []json.Number{v.T, v.Since, v.Rev} { // a rev is a millisecond time, too
		if ms, err := n.Int64(); err == nil && ms > 1e12 {
			return millis(ms)
		}
	}
	return time.Time{}
}

// tree prints the topics level by level; a level with a single child is joined
// with it.
func (a *app) tree(rows []topicRow) {
	slices.SortFunc(rows, func(x, y topicRow) int { // a/b before a-b: by levels
		return slices.Compare(strings.Split(x.Topic, "/"), strings.Split(y.Topic, "/"))
	})
	a.branch(rows, "", 0)
}

func (a *app) branch(rows []topicRow, prefix string, depth int) {
	for len(rows) > 0 {
		level := levelAfter(rows[0].Topic, prefix)
		n, sum := 0, 0
		for n < len(rows) && (rows[n].Topic == prefix+level || strings.HasPrefix(rows[n].Topic, prefix+level+"/")) {
			sum += rows[n].Size
			n++
		}
		if n == 0 { // cannot be: rows[0] has the level
			return
		}
		group, full := rows[:n], prefix+level
		name := level
		for n > 1 && group[0].Topic != full {
			next := levelAfter(group[0].Topic, full+"/")
			if !strings.HasPrefix(group[n-1].Topic+"/", full+"/"+next+"/") {
				break
			}
			full, name = full+"/"+next, name+"/"+next
		}
		indent := strings.Repeat("  ", depth)
		switch n {
		case 1:
			fmt.Fprintf(a.out, "%s%s  %s\n", indent, strings.TrimPrefix(group[0].Topic, prefix), size(group[0].Size))
		default:
			fmt.Fprintf(a.out, "%s%s  (%d topics, %s)\n", indent, name, n, size(sum))
			if group[0].Topic == full {
				fmt.Fprintf(a.out, "%s  .  %s\n", indent, size(group[0].Size))
				group = group[1:]
			}
			a.branch(group, full+"/", depth+1)
		}
		rows = rows[n:]
	}
}

func levelAfter(t, prefix string) string {
	level, _, _ := strings.Cut(strings.TrimPrefix(t, prefix), "/")
	return level
}
