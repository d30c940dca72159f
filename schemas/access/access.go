// Package access says who may use which topic: the design's law of one writer
// per topic, written once and asked by both brokers.
//
//	id := access.Identity{Role: access.Node, Name: "plant-7"}
//	err := id.MayPublish("fl/plant-7/reported/node", "") // nil
//	err = id.MayPublish("fl/plant-8/reported/node", "")  // refused, with the reason
package access

import (
	"fmt"
	"strings"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Role is what a client is to the fabric.
type Role uint8

// The roles. Cloud, Node and Operator occur on the cloud broker; Mapper and
// Local on a node's own bus.
const (
	Nobody   Role = iota
	Cloud         // cloudbridge
	Node          // an edge node's link; Name is the node
	Operator      // a person or tool on the cloud broker's local listener: reads all, writes users' topics
	Mapper        // a driver on a node's bus; Name is the mapper's
	Local         // any client on a node's own host
)

func (r Role) String() string {
	switch r {
	case Cloud:
		return "cloud"
	case Node:
		return "node"
	case Operator:
		return "operator"
	case Mapper:
		return "mapper"
	case Local:
		return "local"
	default:
		return "nobody"
	}
}

// Identity is an authenticated client.
type Identity struct {
	Role Role
	Name string
}

func (i Identity) String() string {
	if i.Name == "" {
		return i.Role.String()
	}
	return i.Role.String() + "/" + i.Name
}

// MayPublish refuses a topic that is not the identity's to write. here is the
// node that the broker belongs to, empty on the cloud broker. The error is for
// the client: it says what may be written instead.
func (i Identity) MayPublish(t topic.Topic, here string) error {
	if !topic.Owned(string(t)) {
		switch i.Role {
		case Nobody:
			return fmt.Errorf("%s may not publish", i)
		case Node:
			return fmt.Errorf("node %s may publish below %s/%s/ only", i.Name, topic.Root, i.Name)
		}
		return nil
	}
	p, err := topic.Parse(string(t))
	if err != nil {
		return err
	}
	if here != "" && p.Node != here {
		return fmt.Errorf("this is the bus of node %s; topics of node %s are not here", here, p.Node)
	}
	writer := p.Kind.Writer()
	switch i.Role {
	case Cloud:
		if writer == topic.WriterCloud {
			return nil
		}
	case Node:
		if p.Node != i.Name {
			return fmt.Errorf("node %s may publish below %s/%s/ only", i.Name, topic.Root, i.Name)
		}
		// The node carries to the cloud what its mappers and clients wrote on its bus.
		if writer == topic.WriterNode || writer == topic.WriterMapper || p.Kind == topic.KindEvent {
			return nil
		}
	case Mapper:
		if writer == topic.WriterMapper || writer == topic.WriterLocal {
			return nil
		}
	case Local:
		if writer == topic.WriterLocal {
			return nil
		}
	}
	return fmt.Errorf("%s is written by %s, not by %s%s", p.Kind, writerName(writer), i, hint(i, p))
}

func hint(i Identity, p topic.Parsed) string {
	if (i.Role == Local || i.Role == Mapper) && (p.Kind == topic.KindReportedTwin || p.Kind == topic.KindReportedTarget || p.Kind == topic.KindDesiredTwin) {
		return "; publish a wish to " + string(topic.Set(p.Node, p.Namespace, p.Name, p.Property))
	}
	return ""
}

func writerName(w topic.Writer) string {
	switch w {
	case topic.WriterCloud:
		return "the cloud"
	case topic.WriterNode:
		return "the node's agent"
	case topic.WriterMapper:
		return "the device's mapper"
	default:
		return "local clients"
	}
}

// MaySubscribe refuses a filter that could select what the identity must not read.
func (i Identity) MaySubscribe(f topic.Filter) error {
	if share, ok := strings.CutPrefix(string(f), "$share/"); ok {
		_, rest, _ := strings.Cut(share, "/")
		f = topic.Filter(rest)
	}
	switch i.Role {
	case Cloud, Operator, Mapper, Local:
		return nil
	case Node:
		if topic.NodeAll(i.Name).Covers(f) {
			return nil
		}
		return fmt.Errorf("node %s may subscribe below %s only", i.Name, topic.NodeAll(i.Name))
	default:
		return fmt.Errorf("%s may not subscribe", i)
	}
}
