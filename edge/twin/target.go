package twin

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// target reads the present target of a reported/target topic.
func (e *Engine) target(t topic.Topic) (payload.Target, bool) {
	b, ok := e.state.Retained(t)
	if !ok {
		return payload.Target{}, false
	}
	var out payload.Target
	if err := json.Unmarshal(b, &out); err != nil {
		return payload.Target{}, false
	}
	return out, true
}

func (e *Engine) wishOf(d *device.Device, property string) (payload.Wish, bool) {
	b, ok := e.state.Retained(topic.DesiredTwin(e.cfg.Node, d.Namespace, d.Name, property))
	if !ok {
		return payload.Wish{}, false
	}
	return decodeWish(b, d)
}

func decodeWish(b []byte, d *device.Device) (payload.Wish, bool) {
	var w payload.Wish
	if json.Unmarshal(b, &w) != nil || len(w.V) == 0 || w.UID != d.UID {
		return payload.Wish{}, false
	}
	return w, true
}

// retarget settles every property of a device from its stored wishes, for a
// device that is new, changed, or read from the store.
func (e *Engine) retarget(d *device.Device) []broker.Message {
	var out []broker.Message
	for i := range d.Properties {
		w, ok := e.wishOf(d, d.Properties[i].Name)
		if ok {
			out = append(out, e.cloud(d, d.Properties[i].Name, &w, false)...)
		}
	}
	return out
}

// wish takes the cloud's wish, or its end for an empty payload.
func (e *Engine) wish(p topic.Parsed, b []byte) []broker.Message {
	d := e.devices[p.Namespace+"/"+p.Name]
	if d == nil {
		return nil // the device follows, and settles its wishes then
	}
	if len(b) == 0 {
		return e.cloud(d, p.Property, nil, false)
	}
	w, ok := decodeWish(b, d)
	if !ok {
		e.log.Warn("wish ignored: not for this device, or not readable", "device", d.Key(), "property", p.Property)
		return nil
	}
	// The link lets a smaller rev through only where the cloud counts anew, or
	// says that this is its present state.
	stored, ok := e.wishOf(d, p.Property)
	return e.cloud(d, p.Property, &w, ok && w.Rev < stored.Rev)
}

// cloud settles a property's target after the cloud wished w, or nothing any
// more for nil. The newer of the cloud's wish and a local one holds; the newer
// is the one with the larger rev. anew: the cloud's revs went back, so that its
// old wish counts for nothing.
func (e *Engine) cloud(d *device.Device, property string, w *payload.Wish, anew bool) []broker.Message {
	prop, ok := d.Property(property)
	if !ok || !prop.Access.Writable() {
		return nil
	}
	t := topic.ReportedTarget(e.cfg.Node, d.Namespace, d.Name, property)
	old, had := e.target(t)
	had = had && old.UID == d.UID
	now := e.now()
	if w != nil && w.Exp != 0 && w.Exp <= payload.Millis(now) {
		w = nil // too late: a stale wish must not move a machine
	}
	switch {
	case w == nil && had && old.By == payload.ByCloud:
		delete(e.expiries, t)
		return []broker.Message{retained(t, nil)}
	case w == nil:
		return nil
	case had && old.By == payload.ByCloud && old.CloudRev() >= w.Rev && !anew:
		return nil // the one we have, or an older one
	case had && old.By == payload.ByLocal && old.Rev >= w.Rev:
		return nil // the local wish is newer
	}
	return []broker.Message{e.setTarget(t, fromWish(w, old.Rev, payload.Millis(now)))}
}

// fromWish makes the target of a cloud wish. Its rev is the wish's own, unless
// the target has a later one: then it goes on from there and names the wish.
func fromWish(w *payload.Wish, prev, now int64) payload.Target {
	n := payload.Target{V: w.V, Rev: w.Rev, UID: w.UID, By: payload.ByCloud, T: now, Exp: w.Exp}
	if n.Rev <= prev {
		n.Rev, n.Wish = prev+1, w.Rev
	}
	return n
}

func (e *Engine) setTarget(t topic.Topic, n payload.Target) broker.Message {
	e.targets.WithLabelValues(n.By).Inc()
	delete(e.expiries, t)
	if n.Exp != 0 {
		e.expiries[t] = n.Exp
		e.signal()
	}
	return retained(t, payload.Encode(n))
}

// set takes a local wish: it is validated against the model, becomes the
// target, and is answered on the response topic if one was given.
func (e *Engine) set(p topic.Parsed, m *broker.Message) ([]broker.Message, error) {
	target, err := e.local(p, m)
	reply := payload.SetReply{OK: err == nil}
	var out []broker.Message
	if err != nil {
		reply.Reason, reply.Error = "error", err.Error()
		if r, ok := err.(*broker.Refusal); ok { //nolint:errorlint // made two lines above
			reply.Reason, reply.Error = r.Kind, r.Reason
		}
	} else {
		reply.Rev = target.Rev
		out = append(out, e.setTarget(topic.ReportedTarget(p.Node, p.Namespace, p.Name, p.Property), target))
	}
	if rt := m.Props.ResponseTopic; rt != "" && e.mayReply(m.From, rt) {
		resp := broker.Message{Topic: topic.Topic(rt), Payload: payload.Encode(reply), QoS: 1}
		resp.Props.CorrelationData = m.Props.CorrelationData
		out = append(out, resp)
	}
	return out, e.count(err)
}

// mayReply lets an answer go only where its asker could publish itself. Topics
// with a $ are the broker's.
func (e *Engine) mayReply(from access.Identity, responseTopic string) bool {
	if strings.HasPrefix(responseTopic, "$") || topic.Filter(responseTopic).Prefix() != responseTopic || topic.Owned(responseTopic) {
		return false
	}
	return from.Role == access.Nobody || from.MayPublish(topic.Topic(responseTopic), e.cfg.Node) == nil
}

// local makes the target of a local wish, or the reason why not.
func (e *Engine) local(p topic.Parsed, m *broker.Message) (payload.Target, error) {
	none := payload.Target{}
	prop, err := e.property(p)
	if err != nil {
		return none, err
	}
	if !prop.Access.Writable() {
		return none, refuse(device.Refuse(device.ReasonAccess, "property %s is read only", prop.Name))
	}
	s, err := payload.ParseSet(m.Payload)
	if err != nil {
		return none, refuse(device.Refuse(device.ReasonPayload, "%v", err))
	}
	v, err := prop.Decode(s.V)
	if err != nil {
		return none, refuse(err)
	}
	d := e.devices[p.Namespace+"/"+p.Name]
	old, had := e.target(topic.ReportedTarget(p.Node, p.Namespace, p.Name, p.Property))
	had = had && old.UID == d.UID
	if s.If != 0 && (!had || old.Rev != s.If) {
		return none, &broker.Refusal{Code: broker.CodeImplementation, Kind: "conflict",
			Reason: fmt.Sprintf("the target's rev is %d, not %d: somebody wished in between", old.Rev, s.If)}
	}
	now := payload.Millis(e.now())
	if s.Exp != 0 && s.Exp <= now {
		return none, &broker.Refusal{Code: broker.CodeImplementation, Kind: "expired",
			Reason: fmt.Sprintf("\"exp\" %d is %d ms in the past; it is milliseconds since 1970", s.Exp, now-s.Exp)}
	}
	prev := old.Rev
	if w, ok := e.wishOf(d, p.Property); ok {
		prev = max(prev, w.Rev)
	}
	who := m.ClientID
	if who == "" {
		who = m.From.String()
	}
	return payload.Target{
		V: prop.Type.Encode(v), Rev: payload.NextRev(prev, e.now()), UID: d.UID,
		By: payload.ByLocal, Who: who, T: now, Exp: s.Exp,
	}, nil
}

// expire ends the targets whose time is over. They give way to the cloud's wish
// that is in the store, if that has not expired; otherwise there is no target
// any more.
func (e *Engine) expire() []broker.Message {
	now := payload.Millis(e.now())
	var out []broker.Message
	for t, exp := range e.expiries {
		if exp > now {
			continue
		}
		delete(e.expiries, t)
		p, err := topic.Parse(string(t))
		if err != nil {
			continue
		}
		old, had := e.target(t)
		if !had || old.Exp == 0 {
			continue
		}
		if old.Exp > now {
			e.expiries[t] = old.Exp
			continue
		}
		e.log.Info("wish expired", "topic", t, "by", old.By, "rev", old.Rev)
		if d := e.devices[p.Namespace+"/"+p.Name]; d != nil {
			if w, ok := e.wishOf(d, p.Property); ok && (w.Exp == 0 || w.Exp > now) {
				n := fromWish(&w, old.Rev, now)
				n.Rev = payload.NextRev(old.Rev, e.now())
				n.Wish = w.Rev
				out = append(out, e.setTarget(t, n))
				continue
			}
		}
		out = append(out, retained(t, nil))
	}
	return out
}
