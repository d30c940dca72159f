package twin

import (
	"encoding/json"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// absence is how long a mapper may be away before its devices count as
// offline: a restart of the mapper or of the agent takes less.
const absence = 10 * time.Second

// Presence tells the engine that a mapper connected to the bus or left it. It
// belongs on the broker's core, as broker.Options.Presence.
//
// Values that nobody reads any more must not look alive for ever: once a mapper
// is away for longer than a restart takes, its devices turn Offline and their
// good readings "bad:stale", with the last value kept. A mapper that is back
// finds that in the retained topics and reports afresh.
func (e *Engine) Presence(id access.Identity, up bool) {
	if id.Role != access.Mapper {
		return
	}
	if up {
		e.present[id.Name]++
		delete(e.absent, id.Name)
		return
	}
	if e.present[id.Name]--; e.present[id.Name] <= 0 {
		delete(e.present, id.Name)
		e.absent[id.Name] = payload.Millis(e.now().Add(absence))
		e.signal()
	}
}

// awaitMappers begins the wait for the mappers whose devices are in the store,
// where it has not begun.
func (e *Engine) awaitMappers() {
	for _, m := range e.state.RetainedMatch(topic.OfKind(e.cfg.Node, topic.KindReportedDevice)) {
		var s payload.DeviceStatus
		if json.Unmarshal(m.Payload, &s) != nil || s.Mapper == "" || e.present[s.Mapper] > 0 {
			continue
		}
		if _, waiting := e.absent[s.Mapper]; !waiting {
			e.absent[s.Mapper] = payload.Millis(e.now().Add(absence))
		}
	}
}

// abandon marks the devices of mappers that stayed away.
func (e *Engine) abandon() []broker.Message {
	now := payload.Millis(e.now())
	var out []broker.Message
	for name, due := range e.absent {
		if due > now {
			continue
		}
		delete(e.absent, name)
		for _, m := range e.state.RetainedMatch(topic.OfKind(e.cfg.Node, topic.KindReportedDevice)) {
			var s payload.DeviceStatus
			if json.Unmarshal(m.Payload, &s) != nil || s.Mapper != name {
				continue
			}
			p, err := topic.Parse(string(m.Topic))
			if err != nil {
				continue
			}
			out = append(out, e.stale(p, now)...)
			was := s
			s.Error = "mapper " + name + " is not connected to the node's bus"
			if s.State != payload.DeviceOffline {
				s.State, s.Since = payload.DeviceOffline, now
			}
			if s != was { // the node may have restarted since
				e.log.Warn("mapper is away, its device counts as offline", "mapper", name, "device", p.Namespace+"/"+p.Name)
				out = append(out, retained(m.Topic, payload.Encode(s)))
			}
		}
	}
	return out
}

// stale turns a device's good readings bad.
func (e *Engine) stale(p topic.Parsed, now int64) []broker.Message {
	var out []broker.Message
	for _, m := range e.state.RetainedMatch(topic.OfDevice(e.cfg.Node, topic.KindReportedTwin, p.Namespace, p.Name)) {
		var r payload.Reading
		if json.Unmarshal(m.Payload, &r) != nil || !r.Good() || string(r.V) == "null" {
			continue
		}
		r.LV, r.V, r.T, r.Q = r.V, json.RawMessage("null"), now, payload.QualityStale
		out = append(out, retained(m.Topic, payload.Encode(r)))
	}
	return out
}
