package link

import (
	"context"
	"errors"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// codeTakenOver is the reason of a connection whose client id connected again
// [MQTT-3.1.4-3].
const codeTakenOver = 0x8e

// free is how long nobody else may be seen online before the link is taken: who
// took it over says so only when its subscriptions are made.
const free = 3 * time.Second

// lost notes whether the connection was taken over. We have one at a time, so
// that was another agent with our name: a cloned disk.
func (l *Link) lost(reason error) {
	var r *client.Refused
	if errors.As(reason, &r) && r.Code == codeTakenOver {
		l.takeovers.Add(1)
		l.taken.Store(true)
	}
}

// standby keeps two agents with one name from taking the link from each other
// for ever. Taken over, we look who did it: the one that has been running longer
// has the link, and the other watches until it is gone.
func (l *Link) standby(ctx context.Context) {
	if !l.taken.Swap(false) {
		return
	}
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	nobody := time.AfterFunc(time.Hour, leave) // counts from the connection on
	defer nobody.Stop()
	defer l.waiting.Store(false)
	c, err := client.New(client.Config{
		URL: l.cfg.URL, ClientID: "fairlead-edge-standby", Username: l.cfg.Node, Password: l.cfg.Token, KeepAlive: l.cfg.KeepAlive,
		Subscriptions: []client.Subscription{{Filter: topic.Filter(topic.ReportedLink(l.cfg.Node)), QoS: 1}},
		OnUp:          func(context.Context) { nobody.Reset(free) },
		OnDown:        func(error) { nobody.Stop() }, // it may still be there
		OnMessage: func(m client.Message) {
			var s payload.Link
			err := payload.Decode(m.Payload, &s)
			switch {
			case err != nil || !s.Online || s.Epoch == l.epoch:
				l.waiting.Store(false)
				nobody.Reset(free)
			case s.Epoch > l.epoch:
				l.log.Error("another agent took the node's link over; it is the newer one, taking the link back: switch one of them off, or give it another name",
					"node", l.cfg.Node, "other_host", s.Host, "other_epoch", s.Epoch, "other_since", time.UnixMilli(s.Since), "epoch", l.epoch)
				leave()
			default:
				nobody.Stop()
				if !l.waiting.Swap(true) {
					l.log.Error("another agent has the node's link and has been running longer; on standby until it is gone: switch one of them off, or give it another name",
						"node", l.cfg.Node, "other_host", s.Host, "other_epoch", s.Epoch, "other_since", time.UnixMilli(s.Since), "epoch", l.epoch)
				}
			}
		},
		MinBackoff: l.cfg.minBackoff, MaxBackoff: l.cfg.maxBackoff,
		Logger: l.log,
	})
	if err != nil { // the link's own client was made from the same
		l.log.Error("cannot look who took the link over", "error", err)
		return
	}
	_ = c.Run(ctx)
}
