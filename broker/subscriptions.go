package broker

import (
	"errors"
	"slices"
	"strings"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// subscription is one session's subscription.
type subscription struct {
	store.Subscription

	session *session
	share   *share // of a shared subscription
}

// share is the members of a shared subscription, in the order they came.
type share struct {
	filter  string // with its $share/name/
	members []*subscription
	next    int
}

// pick chooses who gets the next message: in turn, but nobody who is away while
// somebody is there [MQTT-4.8.2-4], and of those nobody who lags while another
// does not. except may be nil.
func (g *share) pick(except *session) *subscription {
	var best *subscription
	rank := 0
	for i := range g.members {
		k := (g.next + i) % len(g.members)
		m := g.members[k]
		if m.session == except {
			continue
		}
		r := m.session.readiness()
		if r > rank {
			best, rank = m, r
			if r == ready {
				g.next = k + 1
				return best
			}
		}
	}
	if best != nil {
		g.next = slices.Index(g.members, best) + 1
	}
	return best
}

// shareName splits the filter of a shared subscription; ok tells whether it is one.
func shareName(filter string) (name, inner string, ok bool) {
	rest, ok := strings.CutPrefix(filter, "$share/")
	if !ok {
		return "", filter, false
	}
	name, inner, _ = strings.Cut(rest, "/")
	return name, inner, true
}

// checkFilter says what is wrong with a topic filter [MQTT-4.7.1-1] to
// [MQTT-4.7.3-1], [MQTT-4.8.2-1], [MQTT-4.8.2-2].
func checkFilter(filter string) error {
	name, inner, shared := shareName(filter)
	if shared && (name == "" || strings.ContainsAny(name, "+#")) {
		return errors.New("a shared subscription is $share/NAME/FILTER, its name without wildcards")
	}
	if inner == "" {
		return errors.New("the topic filter is empty")
	}
	if strings.ContainsRune(inner, 0) {
		return errors.New("the topic filter contains a zero character")
	}
	for level, rest, more := "", inner, true; more; {
		level, rest, more = strings.Cut(rest, "/")
		if level == "#" && more {
			return errors.New("# stands at the end of a topic filter only")
		}
		if len(level) > 1 && strings.ContainsAny(level, "+#") {
			return errors.New("a wildcard fills its whole level")
		}
	}
	return nil
}

// subscriptions is the index of all subscriptions by filter. It is the core's own.
type subscriptions struct {
	root  level
	count int
}

// level is one level of topic filters.
type level struct {
	next   map[string]*level
	subs   []*subscription
	shares map[string]*share // by name
}

func (l *level) empty() bool { return len(l.next) == 0 && len(l.subs) == 0 && len(l.shares) == 0 }

func (x *subscriptions) add(sub *subscription) {
	name, inner, shared := shareName(sub.Filter)
	l := &x.root
	for part, rest, more := "", inner, true; more; {
		part, rest, more = strings.Cut(rest, "/")
		child := l.next[part]
		if child == nil {
			if l.next == nil {
				l.next = map[string]*level{}
			}
			child = &level{}
			l.next[strings.Clone(part)] = child
		}
		l = child
	}
	x.count++
	if !shared {
		l.subs = append(l.subs, sub)
		return
	}
	g := l.shares[name]
	if g == nil {
		if l.shares == nil {
			l.shares = map[string]*share{}
		}
		g = &share{filter: sub.Filter}
		l.shares[name] = g
	}
	sub.share = g
	g.members = append(g.members, sub)
}

func (x *subscriptions) remove(sub *subscription) {
	name, inner, shared := shareName(sub.Filter)
	x.root.remove(inner, func(l *level) {
		is := func(s *subscription) bool { return s == sub }
		if !shared {
			l.subs = slices.DeleteFunc(l.subs, is)
			return
		}
		if g := l.shares[name]; g != nil {
			g.members = slices.DeleteFunc(g.members, is)
			if len(g.members) == 0 {
				delete(l.shares, name)
			}
		}
	})
	x.count--
}

func (l *level) remove(rest string, at func(*level)) {
	part, rest, more := strings.Cut(rest, "/")
	child := l.next[part]
	if child == nil {
		return
	}
	if more {
		child.remove(rest, at)
	} else {
		at(child)
	}
	if child.empty() {
		delete(l.next, part)
	}
}

// share gives the members of a shared subscription, or nil.
func (x *subscriptions) share(filter string) *share {
	name, inner, _ := shareName(filter)
	l := &x.root
	for part, rest, more := "", inner, true; more; {
		part, rest, more = strings.Cut(rest, "/")
		if l = l.next[part]; l == nil {
			return nil
		}
	}
	return l.shares[name]
}

// match appends the levels whose subscriptions select the topic. Wildcards at
// the first level do not select topics that begin with $ [MQTT-4.7.2-1].
func (x *subscriptions) match(t topic.Topic, out []*level) []*level {
	return x.root.match(string(t), !strings.HasPrefix(string(t), "$"), out)
}

func (l *level) match(rest string, wild bool, out []*level) []*level {
	part, rest, more := strings.Cut(rest, "/")
	if wild {
		if child := l.next["#"]; child != nil {
			out = append(out, child)
		}
	}
	for i, name := range [2]string{part, "+"} {
		if i == 1 && !wild {
			break
		}
		child := l.next[name]
		if child == nil {
			continue
		}
		if more {
			out = child.match(rest, true, out)
			continue
		}
		out = append(out, child)
		if all := child.next["#"]; all != nil { // sport/# selects sport [MQTT-4.7.1-2]
			out = append(out, all)
		}
	}
	return out
}
