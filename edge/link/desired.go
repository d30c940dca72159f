package link

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// maxStored bounds the topics that are stored in one commit.
const maxStored = 256

func retained(t topic.Topic, p []byte) broker.Message {
	return broker.Message{Topic: t, Payload: p, QoS: 1, Retain: true}
}

// desired stores what came of the desired state, as far as it is not older than
// what is there. Of a topic that came several times the last counts.
func (l *Link) desired(ms []broker.Message) {
	at := make(map[topic.Topic]int, len(ms))
	var out []broker.Message
	for _, m := range ms {
		i, again := at[m.Topic]
		var held []byte
		if again {
			held = out[i].Payload
		} else {
			held, _ = l.bus.Retained(m.Topic)
		}
		switch {
		case !l.in.Accepts(m.Topic, held, m.Payload):
			l.log.Info("older state ignored", "topic", m.Topic)
		case again:
			out[i] = m
		default:
			at[m.Topic] = len(out)
			out = append(out, m)
		}
	}
	// The twin engine sees the messages of a commit before any is stored: a wish
	// finds its device only behind it.
	slices.SortStableFunc(out, func(a, b broker.Message) int { return rank(a.Topic) - rank(b.Topic) })
	for chunk := range slices.Chunk(out, maxStored) {
		l.store(chunk)
	}
}

func rank(t topic.Topic) int {
	if p, err := topic.Parse(string(t)); err == nil && p.Kind == topic.KindDesiredTwin {
		return 1
	}
	return 0
}

// absent drops what the cloud does not have any more.
func (l *Link) absent(topics []topic.Topic) {
	for chunk := range slices.Chunk(topics, maxStored) {
		ms := make([]broker.Message, len(chunk))
		for i, t := range chunk {
			ms[i] = retained(t, nil)
		}
		l.store(ms)
	}
}

// store stores messages in one commit.
func (l *Link) store(ms []broker.Message) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := l.bus.Publish(ctx, ms...)
	var refused *broker.Refusal
	if errors.As(err, &refused) && len(ms) > 1 { // one that is no good must not keep the others out
		for i := range ms {
			l.store(ms[i : i+1])
		}
		return
	}
	if err != nil {
		// The digest goes on to differ, so the repair tries again.
		l.log.Warn("desired state not stored, the repair tries again", "topic", ms[0].Topic, "topics", len(ms), "error", err)
		return
	}
	for _, m := range ms {
		l.in.Put(m.Topic, m.Payload)
	}
}
