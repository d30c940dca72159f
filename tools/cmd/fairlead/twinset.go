package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// wish is what `twin set` was asked for.
type wish struct {
	ref
	value string
	node  string
	exp   time.Duration
	rev   int64
	wait  bool
}

func (a *app) twinSetCommand() *cobra.Command {
	var w wish
	cmd := &cobra.Command{
		Use:   "set [NAMESPACE/]DEVICE/PROPERTY VALUE",
		Short: "Wish for a value",
		Long: `Wish for a value.

On a node's own bus (--broker) it is a local wish: the node checks it against the
model, and answers with the target's rev or the reason for its refusal. It works
without the cloud. The newer of a local wish and the cloud's holds.

With --kubeconfig it is the cloud's wish: it goes into Device.spec.desired, where
the cluster checks it. The value null takes the wish back.

The cloud broker takes no wishes: there the cluster is the one writer.

VALUE is JSON; a text needs no quotes where the property is a string. The exit
code is 1 for a wish that was refused, and with --wait for one that the mapper
could not carry out.`,
		Example: `  fairlead twin set pump-1/speedSetpoint 40
  fairlead twin set pump-1/speedSetpoint 40 --exp 10m --wait
  fairlead twin set pump-1/pump false --if 1790000000123
  fairlead twin set pump-1/speedSetpoint 40 --kubeconfig cluster.kubeconfig --wait`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if w.ref, err = a.propertyRef(args[0]); err != nil {
				return err
			}
			w.value = args[1]
			if w.exp < 0 || w.rev < 0 {
				return errors.New("--exp and --if cannot be negative")
			}
			if a.kubeconfig != "" {
				if w.exp != 0 || w.rev != 0 || w.node != "" {
					return errors.New("--exp, --if and --node are for local wishes: a Device's spec.desired has none of them")
				}
				return a.kubeSet(cmd.Context(), w)
			}
			return a.localSet(cmd.Context(), w)
		},
	}
	f := cmd.Flags()
	f.StringVar(&w.node, "node", "", "node of the device, where it is on several")
	f.DurationVar(&w.exp, "exp", 0, "time after which the wish loses its force, such as 10m; never by default")
	f.Int64Var(&w.rev, "if", 0, "only if the target's rev is still this one")
	f.BoolVar(&w.wait, "wait", false, "wait until the mapper has carried it out, up to --timeout")
	return cmd
}

// outcome is what `twin set` tells.
type outcome struct {
	OK     bool   `json:"ok"`
	Rev    int64  `json:"rev,omitempty"`
	Reason string `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"`
	// Applied tells, with --wait, that the mapper has carried the wish out.
	Applied *bool           `json:"applied,omitempty"`
	Value   json.RawMessage `json:"value,omitempty"` // as it was read back
	Millis  int64           `json:"ms,omitempty"`    // from the wish to its ack
}

// jsonValue is the value as JSON: as it was typed where it is JSON, else as a
// text. With the model known a string needs no quotes even where it looks like
// a number.
func jsonValue(v string, p *device.Property) json.RawMessage {
	text := p != nil && (p.Type == device.String || p.Type == device.Bytes) && !strings.HasPrefix(v, `"`)
	if json.Valid([]byte(v)) && !text {
		return json.RawMessage(v)
	}
	return device.String.Encode(v)
}

func (a *app) localSet(ctx context.Context, w wish) error {
	reply := topic.Topic("fairlead/reply/" + random(8))
	f := twinFilters([]ref{w.ref}, w.node)
	f = append(f, digests(w.node)...)
	f = append(f, topic.Filter(reply))
	s, err := a.connect(ctx, a.broker, subscriptions(f...)...)
	if err != nil {
		return err
	}
	defer s.stop()
	st := state{}
	if err := a.settleState(ctx, s, st); err != nil {
		return err
	}
	node, prop, err := a.find(st, w)
	if err != nil {
		return err
	}
	if !st.ownBus() {
		return errors.New(cloudHint("this is the cloud broker, not a node's own bus", a.broker))
	}
	set := payload.Set{V: jsonValue(w.value, prop), If: w.rev}
	if w.exp > 0 {
		set.Exp = payload.Millis(a.now().Add(w.exp))
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	began := a.now()
	token := []byte(random(8))
	answer, err := s.Send(ctx, client.Message{
		Topic: topic.Set(node, w.ns, w.device, w.property), Payload: payload.Encode(set), QoS: 1,
		ResponseTopic: string(reply), CorrelationData: token,
	})
	if err != nil {
		return fmt.Errorf("broker %s: %w", a.broker, err)
	}
	return a.answered(ctx, s, w, outcomeOf{topic.ReportedTwin(node, w.ns, w.device, w.property), reply, string(token), began, answer})
}

// find gives the node of the device and, where its model is known, the property.
func (a *app) find(st state, w wish) (node string, prop *device.Property, err error) {
	var nodes []string
	var rows []row
	for _, t := range st.twins() {
		for _, p := range t.properties {
			rows = append(rows, t.row(p))
		}
		if t.ns != w.ns || t.name != w.device || w.node != "" && t.node != w.node {
			continue
		}
		nodes = append(nodes, t.node)
		if t.wanted != nil {
			prop, _ = t.wanted.Property(w.property)
		}
	}
	switch {
	case len(nodes) == 1:
		return nodes[0], prop, nil
	case len(nodes) > 1:
		return "", nil, fmt.Errorf("device %s/%s is on the nodes %s: choose one with --node", w.ns, w.device, some(nodes))
	case w.node != "":
		return w.node, nil, nil // the broker answers for it
	default:
		return "", nil, missing(w.ref.String(), "at broker "+a.broker, []ref{w.ref}, rows)
	}
}

func cloudHint(what, broker string) string {
	return fmt.Sprintf("%s (%s): a local wish goes to the node's own bus (--broker), the cloud's wish into the cluster (--kubeconfig)", what, broker)
}

// outcomeOf is what the answer to a wish is told by.
type outcomeOf struct {
	reading     topic.Topic
	reply       topic.Topic
	correlation string
	began       time.Time
	ack         <-chan error
}

// answered waits for the node's answer and, where asked for, the mapper's ack.
func (a *app) answered(ctx context.Context, s *session, w wish, o outcomeOf) error {
	var refused error
	var reply *payload.SetReply
	var newest *payload.Reading
	acked := false
	var grace <-chan time.Time // after a refusal: its reason follows at once, if there is one
	for !acked || reply == nil || w.wait && (newest == nil || newest.Ack < reply.Rev) {
		if reply != nil && !reply.OK {
			break
		}
		select {
		case err := <-o.ack:
			acked, o.ack = true, nil
			var r *client.Refused
			if err != nil && !errors.As(err, &r) {
				return fmt.Errorf("the wish may or may not have arrived: %w", err)
			}
			if refused = err; err != nil {
				grace = time.After(quiet)
			}
		case v := <-s.in:
			switch {
			case v.down != nil:
				return fmt.Errorf("the wish may or may not have arrived: broker %s ended the connection: %w", a.broker, v.down)
			case v.Topic == o.reply && string(v.CorrelationData) == o.correlation:
				reply = decode[payload.SetReply](v.Payload)
			case v.Topic == o.reading:
				newest = decode[payload.Reading](v.Payload)
			}
		case <-grace:
			return a.unanswered(ctx, w, reply, refused)
		case <-ctx.Done():
			return a.unanswered(ctx, w, reply, refused)
		}
	}
	out := outcome{OK: reply.OK, Rev: reply.Rev, Reason: reply.Reason, Error: reply.Error}
	if reply.OK && w.wait {
		applied := newest.Err == ""
		out.Applied, out.Value, out.Millis = &applied, newest.V, a.now().Sub(o.began).Milliseconds()
		if !applied {
			out.Reason = newest.Err
		}
	}
	return a.told(w, out)
}

// unanswered says what is missing.
func (a *app) unanswered(ctx context.Context, w wish, reply *payload.SetReply, refused error) error {
	switch {
	case refused != nil:
		if strings.Contains(refused.Error(), "is written by") { // the access rule of another broker than a node's
			return errors.New(cloudHint(refused.Error(), a.broker))
		}
		return refused
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case reply != nil:
		return fmt.Errorf("accepted with rev %d, but the mapper has not carried it out within %s; see `fairlead devices`", reply.Rev, a.timeout)
	default:
		return errors.New(cloudHint(fmt.Sprintf("nobody answered the wish for %s within %s; this may be no node's own bus", w.ref, a.timeout), a.broker))
	}
}

// told prints the outcome; a refusal is an error as well.
func (a *app) told(w wish, o outcome) error {
	name := a.label(w.ns, w.device) + "/" + w.property
	if a.output == "json" {
		if err := a.json(o); err != nil {
			return err
		}
	}
	switch {
	case !o.OK:
		return fmt.Errorf("refused (%s): %s", o.Reason, o.Error)
	case o.Applied != nil && !*o.Applied:
		return fmt.Errorf("accepted with rev %d, but the mapper could not carry it out: %s", o.Rev, o.Reason)
	case a.output == "json":
		return nil
	case o.Applied != nil:
		fmt.Fprintf(a.out, "applied %s = %s, rev %d, in %d ms\n", name, shown(o.Value), o.Rev, o.Millis)
	default:
		fmt.Fprintf(a.out, "accepted %s, rev %d\n", name, o.Rev)
	}
	return nil
}

// kubeSet changes spec.desired of the Device.
func (a *app) kubeSet(ctx context.Context, w wish) error {
	dyn, cfg, err := a.dynamic()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	// The model decides whether 40 is a number or a text.
	prop, err := a.model(ctx, w)
	if err != nil {
		return err
	}
	value := jsonValue(w.value, prop)
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"desired": map[string]json.RawMessage{w.property: value}}})
	if err != nil {
		return err
	}
	began := a.now()
	res := dyn.Resource(devices).Namespace(w.ns)
	u, err := res.Patch(ctx, w.device, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "fairlead"})
	if err != nil {
		if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
			return fmt.Errorf("refused: %w", err)
		}
		return a.kubeError(cfg, err)
	}
	generation := u.GetGeneration()
	if !w.wait || string(value) == "null" {
		if a.output == "json" {
			return a.json(outcome{OK: true})
		}
		fmt.Fprintf(a.out, "wished %s = %s in the cluster\n", w.ref, shown(value))
		return nil
	}
	watch, err := res.Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", w.device).String()})
	if err != nil {
		return a.kubeError(cfg, err)
	}
	defer watch.Stop()
	for {
		select {
		case e, ok := <-watch.ResultChan():
			if !ok {
				return fmt.Errorf("wished, but not carried out within %s: the watch ended; see `fairlead twin get %s --kubeconfig %s`", a.timeout, w.ref, a.kubeconfig)
			}
			if d := deviceOf(e.Object); d != nil {
				if o, done := fate(d, w.property, generation); done {
					o.Millis = a.now().Sub(began).Milliseconds()
					return a.told(w, o)
				}
			}
		case <-ctx.Done():
			return fmt.Errorf("wished, but not carried out within %s; is the node online? See `fairlead twin get %s --kubeconfig %s`", a.timeout, w.ref, a.kubeconfig)
		}
	}
}
