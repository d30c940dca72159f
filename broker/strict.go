package broker

import (
	"encoding/binary"

	"github.com/mochi-mqtt/server/v2/packets"
)

// mochi takes the last of several equal properties, values that mean nothing,
// and reserved bits. That is made up for here, on the bytes before it gets them.

// bodyToCheck is how much of a packet's body is looked at: of a PUBLISH, its
// topic and properties, if they are not longer than that.
func bodyToCheck(first byte) int {
	switch first >> 4 {
	case packets.Publish:
		return 1 << 10
	case packets.Subscribe:
		return 64 << 10
	}
	return 0
}

// checkBody checks what is known of a PUBLISH or SUBSCRIBE of MQTT 5. What is
// cut short or has wrong lengths is left to mochi.
func checkBody(first byte, body []byte, whole bool) packets.Code {
	switch first >> 4 {
	case packets.Publish:
		if len(body) < 2 {
			return packets.CodeSuccess
		}
		at := 2 + int(binary.BigEndian.Uint16(body))
		if first&0x06 != 0 {
			at += 2
		}
		if at >= len(body) || body[at] == 0 {
			return packets.CodeSuccess
		}
		if n, w := binary.Uvarint(body[at:]); w <= 0 || n > uint64(len(body)-at-w) {
			return packets.CodeSuccess
		}
		_, code := skipProperties(body[at:])
		return code
	case packets.Subscribe:
		if len(body) < 3 || !whole {
			return packets.CodeSuccess
		}
		rest, code := skipProperties(body[2:])
		if code != packets.CodeSuccess {
			return code
		}
		for len(rest) > 2 {
			n := 2 + int(binary.BigEndian.Uint16(rest))
			if n >= len(rest) {
				break
			}
			if rest[n]&0xc0 != 0 { // [MQTT-3.8.3-5]
				return packets.ErrMalformedPacket
			}
			rest = rest[n+1:]
		}
	}
	return packets.CodeSuccess
}

// checkConnectProperties checks the properties in the body of a CONNECT of
// MQTT 5 that mochi has decoded, so that all its lengths are right.
func checkConnectProperties(body []byte, will bool) packets.Code {
	name := int(binary.BigEndian.Uint16(body))
	rest, code := skipProperties(body[2+name+4:]) // name, level, flags, keepalive
	if code != packets.CodeSuccess || !will {
		return code
	}
	id := int(binary.BigEndian.Uint16(rest))
	_, code = skipProperties(rest[2+id:])
	return code
}

// skipProperties checks a block of properties and gives what follows it
// [MQTT-2.2.2].
func skipProperties(b []byte) (rest []byte, code packets.Code) {
	n, w := binary.Uvarint(b)
	if w <= 0 || n > uint64(len(b)-w) {
		return nil, packets.ErrMalformedProperties
	}
	p, rest := b[w:w+int(n)], b[w+int(n):]
	var seen uint64
	for len(p) > 0 {
		id := p[0]
		size, ok := propertySize(id, p[1:])
		if !ok || id > 63 || size > len(p)-1 {
			return nil, packets.ErrMalformedProperties
		}
		v := p[1 : 1+size]
		p = p[1+size:]
		if id != packets.PropUser && seen&(1<<id) != 0 {
			return nil, packets.ErrProtocolViolation
		}
		seen |= 1 << id
		switch id {
		case packets.PropReceiveMaximum, packets.PropMaximumPacketSize:
			if allZero(v) {
				return nil, packets.ErrProtocolViolation
			}
		case packets.PropRequestProblemInfo, packets.PropRequestResponseInfo, packets.PropPayloadFormat:
			if v[0] > 1 {
				return nil, packets.ErrProtocolViolation
			}
		}
	}
	return rest, packets.CodeSuccess
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// propertySize is how many bytes the value of a property has that a client may
// send in a CONNECT, a Will, a PUBLISH or a SUBSCRIBE.
func propertySize(id byte, p []byte) (size int, ok bool) {
	text := func(p []byte) int {
		if len(p) < 2 {
			return 2
		}
		return 2 + int(binary.BigEndian.Uint16(p))
	}
	switch id {
	case packets.PropPayloadFormat, packets.PropRequestProblemInfo, packets.PropRequestResponseInfo:
		return 1, true
	case packets.PropSubscriptionIdentifier:
		_, w := binary.Uvarint(p)
		return w, w > 0 && w <= 4
	case packets.PropReceiveMaximum, packets.PropTopicAliasMaximum, packets.PropTopicAlias:
		return 2, true
	case packets.PropMessageExpiryInterval, packets.PropSessionExpiryInterval, packets.PropWillDelayInterval, packets.PropMaximumPacketSize:
		return 4, true
	case packets.PropContentType, packets.PropResponseTopic, packets.PropCorrelationData, packets.PropAuthenticationMethod, packets.PropAuthenticationData:
		return text(p), true
	case packets.PropUser:
		key := text(p)
		if key > len(p) {
			return key, true
		}
		return key + text(p[key:]), true
	}
	return 0, false
}
