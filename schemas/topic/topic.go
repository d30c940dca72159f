// Package topic builds and parses Fairlead's topics: the only place in the code
// where a topic is spelled out.
//
//	t := topic.ReportedTwin("plant-7", "default", "pump-1", "pressure")
//	// fl/plant-7/reported/twin/default/pump-1/pressure
//	p, ok := topic.Parse(string(t))
//	// p.Kind == topic.KindReportedTwin, p.Property == "pressure"
//
// A [Topic] names one message stream and never holds a wildcard; a [Filter]
// selects topics. They are types of their own so that a filter cannot be
// published to.
package topic

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Topic is a complete MQTT topic name without wildcards.
type Topic string

// Filter is an MQTT topic filter; it may hold the wildcards + and #.
type Filter string

// Root is the first level of every topic that Fairlead owns. All other topics
// belong to the users.
const Root = "fl"

// Kind tells what a topic below fl/<node>/ carries.
type Kind uint8

// The kinds, in the order of the table in schemas/README.md.
const (
	KindUnknown Kind = iota
	KindDesiredPod
	KindDesiredConfigMap
	KindDesiredSecret
	KindDesiredToken
	KindDesiredDevice
	KindDesiredTwin
	KindDesiredDigest
	KindReportedLink
	KindReportedNode
	KindReportedPod
	KindReportedDevice
	KindReportedTarget
	KindReportedTwin
	KindReportedDigest
	KindSet
	KindEventGap
	KindEventKubernetes
	KindEvent
	KindSyncDesiredRequest
	KindSyncDesiredManifest
	KindSyncReportedRequest
	KindSyncReportedManifest
)

// Writer names the one party that may publish to a kind.
type Writer uint8

// The writers of the design's second law.
const (
	WriterNone   Writer = iota
	WriterCloud         // cloudbridge
	WriterNode          // the edge agent itself
	WriterMapper        // a mapper on the node's own bus; the agent carries it to the cloud
	WriterLocal         // any client on the node's own bus
)

// shape says how many levels follow the kind's literal levels.
type shape uint8

const (
	shapeNone      shape = iota // no variable level
	shapeObject                 // <ns>/<name>
	shapeProperty               // <ns>/<device>/<property>
	shapeRegarding              // <ns>/<kind>/<name>
	shapeOpen                   // one or more free levels
)

type spec struct {
	kind     Kind
	path     string // literal levels below fl/<node>/
	shape    shape
	writer   Writer
	retained bool
}

var specs = []spec{
	{KindDesiredPod, "desired/pod", shapeObject, WriterCloud, true},
	{KindDesiredConfigMap, "desired/configmap", shapeObject, WriterCloud, true},
	{KindDesiredSecret, "desired/secret", shapeObject, WriterCloud, true},
	{KindDesiredToken, "desired/token", shapeObject, WriterCloud, true},
	{KindDesiredDevice, "desired/device", shapeObject, WriterCloud, true},
	{KindDesiredTwin, "desired/twin", shapeProperty, WriterCloud, true},
	{KindDesiredDigest, "desired/digest", shapeNone, WriterCloud, true},
	{KindReportedLink, "reported/link", shapeNone, WriterNode, true},
	{KindReportedNode, "reported/node", shapeNone, WriterNode, true},
	{KindReportedPod, "reported/pod", shapeObject, WriterNode, true},
	{KindReportedDevice, "reported/device", shapeObject, WriterMapper, true},
	{KindReportedTarget, "reported/target", shapeProperty, WriterNode, true},
	{KindReportedTwin, "reported/twin", shapeProperty, WriterMapper, true},
	{KindReportedDigest, "reported/digest", shapeNone, WriterNode, true},
	{KindSet, "set", shapeProperty, WriterLocal, false},
	{KindEventGap, "event/gap", shapeNone, WriterNode, false}, // before event, whose grammar it follows
	{KindEventKubernetes, "event/kubernetes", shapeRegarding, WriterNode, false},
	{KindEvent, "event", shapeOpen, WriterLocal, false},
	{KindSyncDesiredRequest, "sync/desired/request", shapeNone, WriterNode, false},
	{KindSyncDesiredManifest, "sync/desired/manifest", shapeNone, WriterCloud, false},
	{KindSyncReportedRequest, "sync/reported/request", shapeNone, WriterCloud, false},
	{KindSyncReportedManifest, "sync/reported/manifest", shapeNone, WriterNode, false},
}

func specOf(k Kind) spec {
	for _, s := range specs {
		if s.kind == k {
			return s
		}
	}
	return spec{}
}

// String gives the literal levels of the kind, for example "desired/pod".
func (k Kind) String() string {
	if s := specOf(k); s.path != "" {
		return s.path
	}
	return "unknown"
}

// Writer tells who may publish topics of this kind.
func (k Kind) Writer() Writer { return specOf(k).writer }

// Retained tells whether messages of this kind are state (retained) or not.
func (k Kind) Retained() bool { return specOf(k).retained }

// Kinds lists every kind of the wire contract, in the order of its table.
func Kinds() []Kind {
	out := make([]Kind, len(specs))
	for i, s := range specs {
		out[i] = s.kind
	}
	return out
}

func build(node string, k Kind, levels ...string) Topic {
	var b strings.Builder
	b.WriteString(Root)
	b.WriteByte('/')
	b.WriteString(node)
	b.WriteByte('/')
	b.WriteString(k.String())
	for _, l := range levels {
		b.WriteByte('/')
		b.WriteString(l)
	}
	return Topic(b.String())
}

// DesiredPod is fl/<node>/desired/pod/<ns>/<name>, written by the cloud.
func DesiredPod(node, ns, name string) Topic { return build(node, KindDesiredPod, ns, name) }

// DesiredConfigMap is fl/<node>/desired/configmap/<ns>/<name>, written by the cloud.
func DesiredConfigMap(node, ns, name string) Topic {
	return build(node, KindDesiredConfigMap, ns, name)
}

// DesiredSecret is fl/<node>/desired/secret/<ns>/<name>, written by the cloud.
func DesiredSecret(node, ns, name string) Topic { return build(node, KindDesiredSecret, ns, name) }

// DesiredToken is fl/<node>/desired/token/<ns>/<pod>, written by the cloud.
func DesiredToken(node, ns, pod string) Topic { return build(node, KindDesiredToken, ns, pod) }

// DesiredDevice is fl/<node>/desired/device/<ns>/<name>, written by the cloud.
func DesiredDevice(node, ns, name string) Topic { return build(node, KindDesiredDevice, ns, name) }

// DesiredTwin is fl/<node>/desired/twin/<ns>/<device>/<property>, written by the cloud.
func DesiredTwin(node, ns, device, property string) Topic {
	return build(node, KindDesiredTwin, ns, device, property)
}

// DesiredDigest is fl/<node>/desired/digest, written by the cloud.
func DesiredDigest(node string) Topic { return build(node, KindDesiredDigest) }

// ReportedLink is fl/<node>/reported/link, written by the node and its Will.
func ReportedLink(node string) Topic { return build(node, KindReportedLink) }

// ReportedNode is fl/<node>/reported/node, written by the node.
func ReportedNode(node string) Topic { return build(node, KindReportedNode) }

// ReportedPod is fl/<node>/reported/pod/<ns>/<name>, written by the node.
func ReportedPod(node, ns, name string) Topic { return build(node, KindReportedPod, ns, name) }

// ReportedDevice is fl/<node>/reported/device/<ns>/<name>, written by the device's mapper.
func ReportedDevice(node, ns, name string) Topic { return build(node, KindReportedDevice, ns, name) }

// ReportedTarget is fl/<node>/reported/target/<ns>/<device>/<property>, written by the node.
func ReportedTarget(node, ns, device, property string) Topic {
	return build(node, KindReportedTarget, ns, device, property)
}

// ReportedTwin is fl/<node>/reported/twin/<ns>/<device>/<property>, written by the device's mapper.
func ReportedTwin(node, ns, device, property string) Topic {
	return build(node, KindReportedTwin, ns, device, property)
}

// ReportedDigest is fl/<node>/reported/digest, written by the node.
func ReportedDigest(node string) Topic { return build(node, KindReportedDigest) }

// Set is fl/<node>/set/<ns>/<device>/<property>, written by local clients, not retained.
func Set(node, ns, device, property string) Topic { return build(node, KindSet, ns, device, property) }

// EventGap is fl/<node>/event/gap, written by the node in the place of events
// that its log dropped.
func EventGap(node string) Topic { return build(node, KindEventGap) }

// EventKubernetes is fl/<node>/event/kubernetes/<ns>/<kind>/<name>, written by the
// node: an Event about the object of that kind, such as Pod. Of an object without
// a namespace, as a Node is, ns is default.
func EventKubernetes(node, ns, kind, name string) Topic {
	return build(node, KindEventKubernetes, ns, kind, name)
}

// IsEvent tells whether messages of the kind go through the node's event log.
func (k Kind) IsEvent() bool {
	return k == KindEvent || k == KindEventGap || k == KindEventKubernetes
}

// SyncRequest is where the receiver of a direction asks its writer for repair.
func SyncRequest(node string, d Direction) Topic {
	if d == Desired {
		return build(node, KindSyncDesiredRequest)
	}
	return build(node, KindSyncReportedRequest)
}

// SyncManifest is where the writer of a direction answers with its manifest.
func SyncManifest(node string, d Direction) Topic {
	if d == Desired {
		return build(node, KindSyncDesiredManifest)
	}
	return build(node, KindSyncReportedManifest)
}

// Direction is one of the two halves of a node's state.
type Direction uint8

// Desired flows from the cloud to the node, Reported from the node to the cloud.
const (
	Desired Direction = iota
	Reported
)

func (d Direction) String() string {
	if d == Desired {
		return "desired"
	}
	return "reported"
}

// Digest is the direction's digest topic for the node.
func (d Direction) Digest(node string) Topic {
	if d == Desired {
		return DesiredDigest(node)
	}
	return ReportedDigest(node)
}

// All selects every topic of the direction for one node.
func (d Direction) All(node string) Filter {
	return Filter(Root + "/" + node + "/" + d.String() + "/#")
}

// AllNodes selects every topic of the direction for every node.
func (d Direction) AllNodes() Filter { return Filter(Root + "/+/" + d.String() + "/#") }

// NodeAll selects everything that belongs to one node.
func NodeAll(node string) Filter { return Filter(Root + "/" + node + "/#") }

// OfKind selects every topic of one kind for one node; node may be "+".
func OfKind(node string, k Kind) Filter {
	f := Root + "/" + node + "/" + k.String()
	if specOf(k).shape != shapeNone {
		f += "/#"
	}
	return Filter(f)
}

// OfDevice selects a device's properties below a kind that has properties.
func OfDevice(node string, k Kind, ns, device string) Filter {
	return Filter(string(build(node, k, ns, device)) + "/#")
}

// Parsed is a topic taken apart. Namespace, Name, Property and Regarding are empty
// where the kind has no such level; Regarding is the kind of the Kubernetes object
// that an event is about; Rest holds the free levels of an event topic.
type Parsed struct {
	Node      string
	Kind      Kind
	Namespace string
	Name      string
	Property  string
	Regarding string
	Rest      string
}

// Topic puts the parts together again.
func (p Parsed) Topic() Topic {
	switch specOf(p.Kind).shape {
	case shapeObject:
		return build(p.Node, p.Kind, p.Namespace, p.Name)
	case shapeProperty:
		return build(p.Node, p.Kind, p.Namespace, p.Name, p.Property)
	case shapeRegarding:
		return build(p.Node, p.Kind, p.Namespace, p.Regarding, p.Name)
	case shapeOpen:
		return build(p.Node, p.Kind, p.Rest)
	default:
		return build(p.Node, p.Kind)
	}
}

// Direction tells to which half of the node's digested state the topic belongs.
// ok is false for topics that no digest covers: the digests themselves, the
// link (its Will is written by the broker), set, event and sync.
func (p Parsed) Direction() (d Direction, ok bool) {
	switch p.Kind {
	case KindDesiredPod, KindDesiredConfigMap, KindDesiredSecret, KindDesiredToken, KindDesiredDevice, KindDesiredTwin:
		return Desired, true
	case KindReportedNode, KindReportedPod, KindReportedDevice, KindReportedTarget, KindReportedTwin:
		return Reported, true
	default:
		return 0, false
	}
}

// ErrForeign is wrapped by the error of [Parse] for a topic below fl/ that is
// not in the wire contract.
var ErrForeign = errors.New("not a Fairlead topic")

// Owned tells whether the topic lies below fl/ and so is Fairlead's.
func Owned(t string) bool { return t == Root || strings.HasPrefix(t, Root+"/") }

// Parse takes a topic apart and checks every level: node, namespace and name
// are Kubernetes names, the property matches [A-Za-z][A-Za-z0-9_.-]{0,62}.
func Parse(t string) (Parsed, error) {
	rest, ok := strings.CutPrefix(t, Root+"/")
	if !ok {
		return Parsed{}, fmt.Errorf("topic %q: %w: it does not begin with %s/", t, ErrForeign, Root)
	}
	node, path, ok := strings.Cut(rest, "/")
	if !ok {
		return Parsed{}, fmt.Errorf("topic %q: %w: nothing follows the node", t, ErrForeign)
	}
	if err := CheckName("node", node); err != nil {
		return Parsed{}, fmt.Errorf("topic %q: %w: %w", t, ErrForeign, err)
	}
	for _, s := range specs {
		tail, ok := strings.CutPrefix(path, s.path)
		if !ok || (tail != "" && tail[0] != '/') {
			continue
		}
		if tail == "/" && s.shape == shapeNone {
			// a/ is another topic than a [MQTT-4.7.3-1]; it must not parse as a.
			return Parsed{}, fmt.Errorf("topic %q: %w: %s takes no further level", t, ErrForeign, s.kind)
		}
		tail = strings.TrimPrefix(tail, "/")
		p := Parsed{Node: node, Kind: s.kind}
		if err := p.fill(s.shape, tail); err != nil {
			return Parsed{}, fmt.Errorf("topic %q: %w: %w", t, ErrForeign, err)
		}
		return p, nil
	}
	return Parsed{}, fmt.Errorf("topic %q: %w: no kind %q below the node", t, ErrForeign, path)
}

func (p *Parsed) fill(s shape, tail string) error {
	levels := strings.Split(tail, "/")
	switch s {
	case shapeNone:
		if tail != "" {
			return fmt.Errorf("%s takes no further level, got %q", p.Kind, tail)
		}
		return nil
	case shapeOpen:
		if tail == "" {
			return fmt.Errorf("%s needs a kind of event", p.Kind)
		}
		if strings.ContainsAny(tail, "+#\x00") { // [MQTT-3.3.2-2], [MQTT-4.7.3-2]
			return fmt.Errorf("%s: want no wildcard and no zero byte, got %q", p.Kind, tail)
		}
		p.Rest = tail
		return nil
	case shapeObject:
		if len(levels) != 2 {
			return fmt.Errorf("%s wants <namespace>/<name>, got %q", p.Kind, tail)
		}
	case shapeProperty:
		if len(levels) != 3 {
			return fmt.Errorf("%s wants <namespace>/<device>/<property>, got %q", p.Kind, tail)
		}
		p.Property = levels[2]
		if err := CheckProperty(p.Property); err != nil {
			return err
		}
	case shapeRegarding:
		if len(levels) != 3 {
			return fmt.Errorf("%s wants <namespace>/<kind>/<name>, got %q", p.Kind, tail)
		}
		p.Regarding = levels[1]
		if !regardingForm.MatchString(p.Regarding) {
			return fmt.Errorf("kind %q: want that of a Kubernetes object, such as Pod", p.Regarding)
		}
	}
	p.Namespace, p.Name = levels[0], levels[1]
	if s == shapeRegarding {
		p.Name = levels[2]
	}
	if err := CheckName("namespace", p.Namespace); err != nil {
		return err
	}
	return CheckName("name", p.Name)
}

var propertyForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]{0,62}$`)

var regardingForm = regexp.MustCompile(`^[A-Z][A-Za-z0-9]{0,62}$`)

// CheckProperty refuses what cannot be a property's name.
func CheckProperty(s string) error {
	if !propertyForm.MatchString(s) {
		return fmt.Errorf("property %q: want a letter, then up to 62 letters, digits, '_', '.' or '-'", s)
	}
	return nil
}

// CheckName refuses what cannot be a Kubernetes name (an RFC 1123 subdomain of
// at most 253 characters). what names the level in the error.
func CheckName(what, s string) error {
	if len(s) == 0 || len(s) > 253 {
		return fmt.Errorf("%s %q: want 1 to 253 characters", what, s)
	}
	edge := true // at a label's first character
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		switch {
		case alnum:
			edge = false
		case c == '-' && !edge && i+1 < len(s) && s[i+1] != '.':
		case c == '.' && !edge && i+1 < len(s):
			edge = true
		default:
			return fmt.Errorf("%s %q: want lower case letters, digits, '-' and '.', beginning and ending with a letter or digit", what, s)
		}
	}
	return nil
}

// Match tells whether the topic is selected by the filter, as MQTT 5 section
// 4.7 has it: + stands for one level, # for the rest and the parent, and a
// leading wildcard does not select topics that begin with $.
func (f Filter) Match(t Topic) bool {
	fs, ts := string(f), string(t)
	if strings.HasPrefix(ts, "$") && (strings.HasPrefix(fs, "+") || strings.HasPrefix(fs, "#")) {
		return false // [MQTT-4.7.2-1]
	}
	for {
		fl, fr, fmore := strings.Cut(fs, "/")
		if fl == "#" {
			return true
		}
		tl, tr, tmore := strings.Cut(ts, "/")
		if fl != "+" && fl != tl {
			return false
		}
		switch {
		case !fmore && !tmore:
			return true
		case fmore && !tmore:
			return fr == "#" // "a/#" selects "a" too
		case !fmore:
			return false
		}
		fs, ts = fr, tr
	}
}

// Covers tells whether every topic that g selects is selected by f as well.
func (f Filter) Covers(g Filter) bool {
	if strings.HasPrefix(string(g), "$") && (strings.HasPrefix(string(f), "+") || strings.HasPrefix(string(f), "#")) {
		return false // [MQTT-4.7.2-1]
	}
	if f == "+/#" {
		f = "#" // every topic has a first level
	}
	fs, gs := strings.Split(string(f), "/"), strings.Split(string(g), "/")
	for i, fl := range fs {
		if fl == "#" {
			return true
		}
		if i >= len(gs) || gs[i] == "#" {
			return false
		}
		if fl != "+" && fl != gs[i] {
			return false
		}
	}
	return len(fs) == len(gs)
}

// Prefix is the literal beginning of the filter, up to its first wildcard.
func (f Filter) Prefix() string {
	i := strings.IndexAny(string(f), "+#")
	if i < 0 {
		return string(f)
	}
	if f[i] == '#' && i > 0 {
		return string(f[:i-1]) // "a/#" selects "a" too
	}
	return string(f[:i])
}
