package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// trail is what both brokers hold about one topic. What it tells is a function
// of that alone.
type trail struct {
	parsed            topic.Parsed
	cloud, edge       state
	hasCloud, hasEdge bool
}

// filters selects what the trail is read from: for a wish itself, its target and
// the reading; for other topics their whole direction, as its digest covers all.
func (tr *trail) filters() []topic.Filter {
	p := tr.parsed
	out := digests(p.Node)
	if tr.steered() {
		for _, t := range []topic.Topic{tr.wish(), tr.target(), tr.reading()} {
			out = append(out, topic.Filter(t))
		}
		return out
	}
	if d, ok := p.Direction(); ok {
		out = append(out, d.All(p.Node))
	} else {
		out = append(out, topic.Filter(p.Topic()))
	}
	if p.Kind == topic.KindDesiredDevice {
		out = append(out, topic.Filter(topic.ReportedDevice(p.Node, p.Namespace, p.Name)))
	}
	return out
}

// steered tells whether it is a wish that is followed.
func (tr *trail) steered() bool {
	switch tr.parsed.Kind {
	case topic.KindDesiredTwin, topic.KindReportedTarget, topic.KindSet:
		return true
	default:
		return false
	}
}

func (tr *trail) wish() topic.Topic {
	p := tr.parsed
	return topic.DesiredTwin(p.Node, p.Namespace, p.Name, p.Property)
}

func (tr *trail) target() topic.Topic {
	p := tr.parsed
	return topic.ReportedTarget(p.Node, p.Namespace, p.Name, p.Property)
}

func (tr *trail) reading() topic.Topic {
	p := tr.parsed
	return topic.ReportedTwin(p.Node, p.Namespace, p.Name, p.Property)
}

// stages gives where the newest wish or payload is. subject names a payload; a
// wish is named by its rev.
func (tr *trail) stages() (subject string, out []stageRow) {
	if tr.steered() {
		return tr.property()
	}
	return tr.topic()
}

// nodeSide is where the node's own topics are read: on its bus, or as they are
// mirrored on the cloud broker.
func (tr *trail) nodeSide() (state, string) {
	if tr.hasEdge {
		return tr.edge, "edge"
	}
	return tr.cloud, "cloud"
}

// seen is the time of something: ours if it came live, else the payload's.
func seen(r retained, inPayload time.Time) time.Time {
	if r.replay {
		return inPayload
	}
	return r.at
}

func (tr *trail) property() (string, []stageRow) {
	node, side := tr.nodeSide()
	wishSide, wishName := tr.cloud, "cloud"
	if !tr.hasCloud {
		wishSide, wishName = tr.edge, "edge"
	}
	rawWish, rawTarget, rawReading := wishSide[tr.wish()], node[tr.target()], node[tr.reading()]
	wish, target, reading := decode[payload.Wish](rawWish.payload), decode[payload.Target](rawTarget.payload), decode[payload.Reading](rawReading.payload)

	var out []stageRow
	var rev, targetRev int64
	switch {
	case wish != nil && (target == nil || target.By == payload.ByCloud || target.Rev < wish.Rev):
		rev = wish.Rev
		out = append(out, stageRow{Stage: "stored", Broker: wishName, Rev: rev, Reached: true, Time: seen(rawWish, millis(wish.Rev)), Detail: "the cloud wishes " + shown(wish.V)})
		sent := stageRow{Stage: "sent", Broker: side, Rev: rev, Detail: "the node has not taken it yet"}
		if target != nil && target.CloudRev() == rev {
			targetRev = target.Rev
			sent.Rev = targetRev
			sent.Reached, sent.Detail = true, "target "+shown(target.V)
			sent.Time = seen(rawTarget, millis(target.T))
			if target.Rev != rev {
				sent.Detail += fmt.Sprintf(", for wish %d", rev)
			}
		}
		out = append(out, sent)
	case target != nil:
		rev, targetRev = target.Rev, target.Rev
		by := targetRow{By: target.By, Who: target.Who}
		// Seen on the cloud broker it is at least stored on the node.
		out = append(out, stageRow{Stage: "stored", Broker: "edge", Rev: rev, Reached: true, Time: millis(target.T), Detail: by.by() + " wishes " + shown(target.V)})
		if tr.hasEdge {
			out[0].Time = seen(rawTarget, millis(target.T))
		}
		if tr.hasCloud {
			sent := stageRow{Stage: "sent", Broker: "cloud", Rev: rev, Detail: "the cloud has not heard of it yet"}
			raw := tr.cloud[tr.target()]
			if up := decode[payload.Target](raw.payload); up != nil && up.Rev >= rev {
				sent.Reached, sent.Detail, sent.Time = true, "the cloud knows the target", seen(raw, time.Time{})
			}
			out = append(out, sent)
		}
	default:
		return "", []stageRow{{Stage: "stored", Broker: wishName, Detail: "nobody wishes anything of it"}}
	}
	acked := stageRow{Stage: "acked", Broker: side, Rev: targetRev, Detail: "the mapper has not finished with it"}
	applied := stageRow{Stage: "applied", Broker: side, Rev: targetRev, Detail: "pending"}
	if targetRev != 0 && reading != nil && reading.Ack >= targetRev {
		// A reading's own time is not that of the ack.
		at := seen(rawReading, time.Time{})
		acked.Reached, acked.Time, acked.Detail = true, at, "by the mapper"
		applied.Reached, applied.Time = true, at
		if reading.Err != "" {
			applied.Stage, applied.Detail = "refused", reading.Err
		} else {
			applied.Detail = "reads " + shown(reading.V)
			if !reading.Good() {
				applied.Detail = "now " + reading.Q
			}
		}
	}
	return "", append(out, acked, applied)
}

// topic follows a payload that is no property's.
func (tr *trail) topic() (string, []stageRow) {
	p := tr.parsed
	t := p.Topic()
	d, covered := p.Direction()
	writer, receiver, wName, rName := tr.cloud, tr.edge, "cloud", "edge"
	hasWriter, hasReceiver := tr.hasCloud, tr.hasEdge
	if w := p.Kind.Writer(); w != topic.WriterCloud {
		writer, receiver, wName, rName = receiver, writer, rName, wName
		hasWriter, hasReceiver = hasReceiver, hasWriter
	}
	newest := writer
	if !hasWriter {
		newest = receiver
	}
	raw, there := newest[t]
	rev := revOf(raw.payload)
	subject := "gone"
	if there {
		subject = digest.Of(string(t), raw.payload).String()
	}
	at := seen(raw, timeOf(t, raw.payload))
	detail := "not retained"
	if there {
		detail = size(len(raw.payload))
	}
	var out []stageRow
	if hasWriter {
		out = append(out, stageRow{Stage: "stored", Broker: wName, Rev: rev, Time: at, Detail: detail, Reached: true})
	}
	if hasReceiver {
		got, gotThere := receiver[t]
		sent := stageRow{Stage: "sent", Broker: rName, Rev: revOf(got.payload)}
		switch {
		case gotThere == there && string(got.payload) == string(raw.payload):
			sent.Reached, sent.Time, sent.Detail = true, seen(got, time.Time{}), "the same payload"
			if !hasWriter {
				sent.Time, sent.Detail = at, detail
			}
		case !gotThere:
			sent.Detail = "not there yet"
		default:
			sent.Detail = "another payload, " + size(len(got.payload))
		}
		out = append(out, sent)
		if covered {
			out = append(out, tr.synced(d, receiver, rName))
		}
	}
	if p.Kind == topic.KindDesiredDevice && there {
		out = append(out, tr.served(rev))
	}
	return subject, out
}

// synced compares the receiver's set with the writer's digest, which only the
// cloud broker has.
func (tr *trail) synced(d topic.Direction, receiver state, name string) stageRow {
	out := stageRow{Stage: "acked", Broker: name}
	raw, ok := tr.cloud[d.Digest(tr.parsed.Node)]
	want := decode[payload.Digest](raw.payload)
	if !ok || want == nil {
		out.Detail = "no digest known: give the cloud broker as --broker"
		return out
	}
	set := digest.NewSet()
	last := raw
	for t, r := range receiver {
		if p, err := topic.Parse(string(t)); err == nil {
			if dir, ok := p.Direction(); ok && dir == d {
				set.Put(string(t), r.payload)
				if r.at.After(last.at) {
					last = r
				}
			}
		}
	}
	if set.Count() != want.Count || set.Sum() != want.Sum {
		out.Detail = fmt.Sprintf("the digest covers %d topics, there are %d, and they differ", want.Count, set.Count())
		if set.Count() != want.Count {
			out.Detail = fmt.Sprintf("the digest covers %d topics, there are %d", want.Count, set.Count())
		}
		return out
	}
	out.Reached, out.Time, out.Detail = true, seen(last, time.Time{}), fmt.Sprintf("in sync, all %d topics", set.Count())
	return out
}

// served tells whether the device's mapper serves this rev of it.
func (tr *trail) served(rev int64) stageRow {
	node, side := tr.nodeSide()
	p := tr.parsed
	raw := node[topic.ReportedDevice(p.Node, p.Namespace, p.Name)]
	s := decode[payload.DeviceStatus](raw.payload)
	out := stageRow{Stage: "applied", Broker: side, Rev: rev, Detail: "no mapper has reported it"}
	if s == nil {
		return out
	}
	out.Detail = fmt.Sprintf("the mapper serves rev %d", s.Rev)
	if s.Rev >= rev {
		out.Reached, out.Time, out.Detail = true, seen(raw, time.Time{}), "served, "+s.State
	}
	return out
}

func revOf(b []byte) int64 {
	var v struct {
		Rev int64 `json:"rev"`
	}
	if json.Unmarshal(b, &v) != nil {
		return 0
	}
	return v.Rev
}
